// Integers and conditions along a row: vectors of 16, with the arithmetic of torch.
//
// i8 and i32 are held as Ints, i64 as Longs, conditions as Ints of 0 and -1. Arithmetic wraps around; results of i8 are
// wrapped by `to<int8_t>`. Division rounds down, as in Python; a quotient by 0 is 0, so that it cannot end the process.
#pragma once

#include "functions.h"

namespace sage {

typedef int64_t Longs __attribute__((vector_size(128)));
typedef uint64_t LongBits __attribute__((vector_size(128)));
typedef int8_t Bytes __attribute__((vector_size(16)));

// Conversions. A float outside the range of its target has an undefined value.

inline Ints ints(Ints x) { return x; }
inline Ints ints(Longs x) { return __builtin_convertvector(x, Ints); }
inline Ints ints(Floats x) { return __builtin_convertvector(x, Ints); }
inline Ints ints(int64_t x) { return Ints{} + (int32_t)x; }
inline Longs longs(Longs x) { return x; }
inline Longs longs(Ints x) { return __builtin_convertvector(x, Longs); }
inline Longs longs(Floats x) { return __builtin_convertvector(x, Longs); }
inline Longs longs(int64_t x) { return Longs{} + x; }
inline Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats floats(Longs x) { return __builtin_convertvector(x, Floats); }

// A comparison of Longs has lanes of 64 bits.
inline Ints condition(Longs comparison) { return __builtin_convertvector(comparison, Ints); }
inline Ints condition(Ints comparison) { return comparison; }

// Wraps a value around to the range of an element type.

template <class Element>
inline Ints wrap(Ints x) {
    return sizeof(Element) == 1 ? (Ints)((Bits)x << 24) >> 24 : x;
}
template <class Element>
inline Longs wrap(Longs x) {
    return x;
}
template <class Element>
inline int64_t wrap(int64_t x) {
    return (Element)x;
}

inline int64_t add(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
inline int64_t subtract(int64_t a, int64_t b) { return (int64_t)((uint64_t)a - (uint64_t)b); }
inline int64_t multiply(int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); }
inline Ints add(Ints a, Ints b) { return (Ints)((Bits)a + (Bits)b); }
inline Ints subtract(Ints a, Ints b) { return (Ints)((Bits)a - (Bits)b); }
inline Ints multiply(Ints a, Ints b) { return (Ints)((Bits)a * (Bits)b); }
inline Longs add(Longs a, Longs b) { return (Longs)((LongBits)a + (LongBits)b); }
inline Longs subtract(Longs a, Longs b) { return (Longs)((LongBits)a - (LongBits)b); }
inline Longs multiply(Longs a, Longs b) { return (Longs)((LongBits)a * (LongBits)b); }

inline Ints maximum(Ints a, Ints b) { return a > b ? a : b; }
inline Ints minimum(Ints a, Ints b) { return a < b ? a : b; }
inline Longs maximum(Longs a, Longs b) { return a > b ? a : b; }
inline Longs minimum(Longs a, Longs b) { return a < b ? a : b; }

inline int64_t floor_divide(int64_t a, int64_t b) {
    if (b == 0) return 0;
    if (b == -1) return subtract(0, a);  // the quotient of the least number overflows
    return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
inline int64_t floor_remainder(int64_t a, int64_t b) { return subtract(a, multiply(floor_divide(a, b), b)); }
inline Ints floor_divide(Ints a, Ints b) {
    for (int lane = 0; lane < LANES; ++lane) a[lane] = (int32_t)floor_divide((int64_t)a[lane], (int64_t)b[lane]);
    return a;
}
inline Longs floor_divide(Longs a, Longs b) {
    for (int lane = 0; lane < LANES; ++lane) a[lane] = floor_divide(a[lane], b[lane]);
    return a;
}
inline Ints floor_remainder(Ints a, Ints b) { return subtract(a, multiply(floor_divide(a, b), b)); }
inline Longs floor_remainder(Longs a, Longs b) { return subtract(a, multiply(floor_divide(a, b), b)); }

// A lane-wise operation with a number that all lanes share.
#define SAGE_WITH_NUMBER(name)                                          \
    inline Ints name(Ints a, int64_t b) { return name(a, ints(b)); }    \
    inline Ints name(int64_t a, Ints b) { return name(ints(a), b); }    \
    inline Longs name(Longs a, int64_t b) { return name(a, longs(b)); } \
    inline Longs name(int64_t a, Longs b) { return name(longs(a), b); }
SAGE_WITH_NUMBER(add)
SAGE_WITH_NUMBER(subtract)
SAGE_WITH_NUMBER(multiply)
SAGE_WITH_NUMBER(maximum)
SAGE_WITH_NUMBER(minimum)
SAGE_WITH_NUMBER(floor_divide)
SAGE_WITH_NUMBER(floor_remainder)
#undef SAGE_WITH_NUMBER

template <class Number>
inline Number power(Number x, int64_t exponent) {
    Number product = x;
    for (int64_t i = 1; i < exponent; ++i) product = multiply(product, x);
    return exponent > 0 ? product : add(multiply(x, 0), 1);
}
template <class Number>
inline Number negate(Number x) {
    return subtract(0, x);
}
inline int64_t abs(int64_t x) { return x < 0 ? subtract(0, x) : x; }
inline int64_t relu(int64_t x) { return x < 0 ? 0 : x; }
inline int32_t abs(int32_t x) { return (int32_t)abs((int64_t)x); }
inline int32_t relu(int32_t x) { return x < 0 ? 0 : x; }
inline Ints relu(Ints x) { return maximum(x, 0); }
inline Longs abs(Longs x) { return x < 0 ? subtract(0, x) : x; }
inline Longs relu(Longs x) { return maximum(x, 0); }

inline Ints where(Ints condition, Ints a, Ints b) { return condition ? a : b; }
inline Longs where(Ints condition, Longs a, Longs b) { return longs(condition) ? a : b; }
template <class Lanes, class = std::enable_if_t<!std::is_arithmetic<Lanes>::value>>
inline Lanes where(Ints condition, Lanes a, int64_t b) {
    return where(condition, a, Lanes{} + (decltype(a[0] + 0))b);
}
template <class Lanes, class = std::enable_if_t<!std::is_arithmetic<Lanes>::value>>
inline Lanes where(Ints condition, int64_t a, Lanes b) {
    return where(condition, Lanes{} + (decltype(b[0] + 0))a, b);
}

// Loads and stores. A bool in memory is a byte of 0 or 1.

inline Ints load(const int32_t* row, Block i) {
    Ints value;
    memcpy(&value, row + i.at, sizeof value);
    return value;
}
inline Longs load(const int64_t* row, Block i) {
    Longs value;
    memcpy(&value, row + i.at, sizeof value);
    return value;
}
inline Ints load(const int8_t* row, Block i) {
    Bytes value;
    memcpy(&value, row + i.at, sizeof value);
    return __builtin_convertvector(value, Ints);
}
inline Ints load(const bool* row, Block i) { return load((const int8_t*)row, i) != 0; }

inline void store(int32_t* row, Block i, Ints value) { memcpy(row + i.at, &value, sizeof value); }
inline void store(int64_t* row, Block i, Longs value) { memcpy(row + i.at, &value, sizeof value); }
inline void store(int8_t* row, Block i, Ints value) {
    Bytes bytes = __builtin_convertvector(value, Bytes);
    memcpy(row + i.at, &bytes, sizeof bytes);
}
inline void store(bool* row, Block i, Ints condition) { store((int8_t*)row, i, condition & 1); }

// Tails and strided elements pass through a padded block. More specific than the templates of elements.h.
#define SAGE_INTEGER_ROWS(Element, Lanes)                                                        \
    inline Lanes load(const Element* row, Tail i) {                                              \
        Element padded[LANES] = {};                                                              \
        for (int64_t lane = 0; lane < i.count; ++lane) padded[lane] = row[i.at + lane];          \
        return load(padded, Block{0});                                                           \
    }                                                                                            \
    inline void store(Element* row, Tail i, Lanes value) {                                       \
        Element padded[LANES];                                                                   \
        store(padded, Block{0}, value);                                                          \
        for (int64_t lane = 0; lane < i.count; ++lane) row[i.at + lane] = padded[lane];          \
    }                                                                                            \
    inline Lanes load_strided(int64_t step, const Element* row, Tail i) {                        \
        Element padded[LANES] = {};                                                              \
        for (int64_t lane = 0; lane < i.count; ++lane) padded[lane] = row[(i.at + lane) * step]; \
        return load(padded, Block{0});                                                           \
    }                                                                                            \
    inline Lanes load_strided(int64_t step, const Element* row, Block i) {                       \
        return load_strided(step, row, Tail{i.at, LANES});                                       \
    }                                                                                            \
    inline void store_strided(int64_t step, Element* row, Tail i, Lanes value) {                 \
        Element padded[LANES];                                                                   \
        store(padded, Block{0}, value);                                                          \
        for (int64_t lane = 0; lane < i.count; ++lane) row[(i.at + lane) * step] = padded[lane]; \
    }                                                                                            \
    inline void store_strided(int64_t step, Element* row, Block i, Lanes value) {                \
        store_strided(step, row, Tail{i.at, LANES}, value);                                      \
    }                                                                                            \
    inline void store_element(Element* target, int64_t value) { *target = (Element)value; }
SAGE_INTEGER_ROWS(bool, Ints)
SAGE_INTEGER_ROWS(int8_t, Ints)
SAGE_INTEGER_ROWS(int32_t, Ints)
SAGE_INTEGER_ROWS(int64_t, Longs)
#undef SAGE_INTEGER_ROWS

}  // namespace sage
