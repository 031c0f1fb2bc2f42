// Element types, and vectors of 16 of them: a load widens to float32, `to` rounds to nearest even, a store narrows.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace sage {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));  // also conditions: a lane is 0 or -1
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

using f32 = float;
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class To, class From>
inline To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From), "the two types must have the same size");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

const Ints LANE_NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats broadcast(float value) { return value - Floats{}; }  // unlike 0 + value, keeps the sign of -0

// bf16: the upper half of a float32.

#if defined(__AVX512F__)
inline Bits zero_extend(Halves bits) { return (Bits)_mm512_cvtepu16_epi32((__m256i)bits); }
#else
inline Bits zero_extend(Halves bits) { return __builtin_convertvector(bits, Bits); }
#endif

inline Floats widen(Halves bits, bf16) { return bits_of<Floats>(zero_extend(bits) << 16); }

inline Halves narrow(Floats value, bf16) {
    Bits bits = bits_of<Bits>(value);
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits quiet = (bits >> 16) | 0x40;  // a NaN must not round to infinity
    return __builtin_convertvector(value == value ? rounded : quiet, Halves);
}

// f16: by the processor if it has the instructions, else by integer arithmetic.

#if defined(__AVX512F__)
inline Floats widen(Halves bits, f16) { return (Floats)_mm512_cvtph_ps((__m256i)bits); }
inline Halves narrow(Floats value, f16) {
    return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
inline Floats widen(Halves bits, f16) {
    Bits wide = __builtin_convertvector(bits, Bits);
    Bits sign = (wide & 0x8000) << 16, rest = (wide & 0x7fff) << 13;
    Floats scaled = bits_of<Floats>(rest) * 0x1p112f;  // the exponent biases differ by 112; exact for subnormals too
    Bits special = rest | 0x7f800000;
    return bits_of<Floats>(sign | (rest >= (0x7c00u << 13) ? special : bits_of<Bits>(scaled)));
}
inline Halves narrow(Floats value, f16) {
    Bits bits = bits_of<Bits>(value), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    Bits normal = (size + 0xc8000fff + ((size >> 13) & 1)) >> 13;  // 0xc8000000 is -112 << 23
    // The last place of a sum with 0.5 is 2^-24, that of f16's subnormals, so that the addition rounds.
    Bits subnormal = bits_of<Bits>(bits_of<Floats>(size) + 0.5f) - 0x3f000000;
    Bits result = size < 0x38800000u ? subnormal : normal;
    result = size >= 0x47800000u ? (Bits{} + 0x7c00) : result;
    result = size > 0x7f800000u ? (Bits{} + 0x7e00) : result;
    return __builtin_convertvector(sign | result, Halves);
}
#endif

// A position in a row: a block of 16 elements, or the tail at its end.

struct Block {
    int64_t at;
};
struct Tail {
    int64_t at;
    int64_t count;
};

inline Ints active_lanes(Block) { return ~Ints{}; }
inline Ints active_lanes(Tail i) { return LANE_NUMBERS < (int32_t)i.count; }

// Rounding to an element type; the result is a float32 that is exact in it.

template <class Element>
inline Floats to(Floats value) {
    return widen(narrow(value, Element{}), Element{});
}
template <>
inline Floats to<f32>(Floats value) {
    return value;
}
#if defined(__AVX512BF16__)  // the instruction takes subnormal numbers for 0
template <>
inline Floats to<bf16>(Floats value) {
    return widen((Halves)_mm512_cvtneps_pbh((__m512)value), bf16{});
}
#else
template <>
inline Floats to<bf16>(Floats value) {
    Bits bits = bits_of<Bits>(value);
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    return value == value ? bits_of<Floats>(rounded) : value;
}
#endif
template <class Element>
inline float to(float value) {
    return to<Element>(broadcast(value))[0];
}

// Loads and stores. A stored value must have been rounded to the element type by `to`, or be exact in it: this is where
// the bf16 store saves its rounding.

template <class Element>
inline Floats load(const Element* row, Block i) {
    Halves bits;
    memcpy(&bits, row + i.at, sizeof bits);
    return widen(bits, Element{});
}
template <>
inline Floats load(const f32* row, Block i) {
    Floats value;
    memcpy(&value, row + i.at, sizeof value);
    return value;
}
template <class Element>
inline Floats load(const Element* row, Tail i) {
    Element padded[LANES] = {};
    for (int64_t lane = 0; lane < i.count; ++lane) padded[lane] = row[i.at + lane];
    return load(padded, Block{0});
}

template <class Element>
inline void store(Element* row, Block i, Floats value) {
    Halves bits = narrow(value, Element{});
    memcpy(row + i.at, &bits, sizeof bits);
}
template <>
inline void store(bf16* row, Block i, Floats value) {
    Halves bits = __builtin_convertvector(bits_of<Bits>(value) >> 16, Halves);
    memcpy(row + i.at, &bits, sizeof bits);
}
template <>
inline void store(f32* row, Block i, Floats value) {
    memcpy(row + i.at, &value, sizeof value);
}
template <class Element>
inline void store(Element* row, Tail i, Floats value) {
    Element padded[LANES];
    store(padded, Block{0}, value);
    for (int64_t lane = 0; lane < i.count; ++lane) row[i.at + lane] = padded[lane];
}
template <class Element, class Position>
inline void store(Element* row, Position i, float value) {
    store(row, i, broadcast(value));
}

// Every `step`-th element of a row: element i of the vector is element i * step of the row.

template <class Element>
inline Floats load_strided(int64_t step, const Element* row, Tail i) {
    Element padded[LANES] = {};
    for (int64_t lane = 0; lane < i.count; ++lane) padded[lane] = row[(i.at + lane) * step];
    return load(padded, Block{0});
}
template <class Element>
inline Floats load_strided(int64_t step, const Element* row, Block i) {
    return load_strided(step, row, Tail{i.at, LANES});
}
template <class Element>
inline void store_strided(int64_t step, Element* row, Tail i, Floats value) {
    Element padded[LANES];
    store(padded, Block{0}, value);
    for (int64_t lane = 0; lane < i.count; ++lane) row[(i.at + lane) * step] = padded[lane];
}
template <class Element>
inline void store_strided(int64_t step, Element* row, Block i, Floats value) {
    store_strided(step, row, Tail{i.at, LANES}, value);
}

// Single elements.

inline float widen(f32 element) { return element; }
template <class Element>
inline float widen(Element element) {
    Halves bits = {element.bits};
    return widen(bits, Element{})[0];
}
template <class Element>
inline void store_element(Element* target, float value) {
    store(target, Tail{0, 1}, broadcast(value));
}

}  // namespace sage
