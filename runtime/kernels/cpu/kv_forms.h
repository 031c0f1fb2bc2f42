// Stored forms of the rows of a KV cache: elements, or codes of 8 bits with a scale for each token and head.
//
// A row of codes is a float32, the scale, and then one byte per element; a value is code * scale. Codes are exact in
// every element type, so that attention multiplies codes and applies the scales to scores and weights. A row with a
// value that is not finite has the codes 0 and the scale NaN or infinity, and reads as NaN.
#pragma once

#include <type_traits>

#include "loops.h"

namespace sage {

struct int8_kv {  // integers from -127 to 127
    int8_t code;
};
struct fp8_kv {  // float8 e4m3fn
    uint8_t code;
};

typedef int8_t SignedBytes __attribute__((vector_size(16)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(16)));

template <class Stored>
constexpr bool IS_CODED = std::is_same_v<Stored, int8_kv> || std::is_same_v<Stored, fp8_kv>;

// The length of a row of `width` elements as stored, in elements of the form.
template <class Stored>
inline int64_t stored_width(int64_t width) {
    return IS_CODED<Stored> ? width + (int64_t)sizeof(float) : width;
}

template <class Stored>
inline float scale_of(const Stored* row) {
    float scale;
    memcpy(&scale, row, sizeof scale);
    return scale;
}
template <class Stored>
inline const Stored* codes_of(const Stored* row) {
    return row + sizeof(float);
}

// 16 codes as floats.

inline Floats value_of(SignedBytes codes, int8_kv) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)codes));
#else
    return __builtin_convertvector(__builtin_convertvector(codes, Ints), Floats);
#endif
}

// The exponents of float8 and float32 differ by 120; subnormal codes are multiples of 2^-9.
inline Floats value_of(SignedBytes codes, fp8_kv) {
#if defined(__AVX512F__)
    const Bits bits = (Bits)_mm512_cvtepu8_epi32((__m128i)codes);
#else
    const Bits bits = __builtin_convertvector((UnsignedBytes)codes, Bits);
#endif
    const Bits size = bits & 0x7f, sign = (bits & 0x80) << 24;
    const Bits subnormal = bits_of<Bits>(__builtin_convertvector((Ints)size, Floats) * 0x1p-9f);
    const Bits magnitude = size < 8 ? subnormal : (size << 20) + (120u << 23);
    return bits_of<Floats>(sign | magnitude);
}

template <class Stored>
inline Floats load_codes(const Stored* codes, Block i) {
    SignedBytes bytes;
    memcpy(&bytes, codes + i.at, sizeof bytes);
    return value_of(bytes, Stored{});
}
template <class Stored>
inline Floats load_codes(const Stored* codes, Tail i) {
    SignedBytes bytes = {};
    memcpy(&bytes, codes + i.at, (size_t)i.count);
    return value_of(bytes, Stored{});
}

// The nearest codes, ties to even, of quotients with at most the largest code as magnitude.

constexpr float largest_code(int8_kv) { return 127.0f; }
constexpr float largest_code(fp8_kv) { return 448.0f; }

inline UnsignedBytes code_of(Floats quotient, int8_kv) {
    const float shift = 0x1.8p23f;  // the last place of a sum with it is 1, so that the addition rounds
    return (UnsignedBytes) __builtin_convertvector(bits_of<Ints>(quotient + shift) - bits_of<int32_t>(shift),
                                                   SignedBytes);
}
inline UnsignedBytes code_of(Floats quotient, fp8_kv) {
    const Bits bits = bits_of<Bits>(quotient), sign = (bits >> 24) & 0x80, size = bits & 0x7fffffff;
    const Bits normal = (size + ((size >> 20) & 1) + 0x7ffff - (120u << 23)) >> 20;
    const float shift = 0x1p14f;  // the last place of a sum with it is 2^-9, that of subnormal codes
    const Bits subnormal = bits_of<Bits>(bits_of<Floats>(size) + shift) - bits_of<uint32_t>(shift);
    return __builtin_convertvector(sign | (size < 0x3c800000u ? subnormal : normal), UnsignedBytes);
}

// Stores a row as codes, with the scale that maps its largest magnitude to the largest code.
template <class E, class Stored>
inline void encode_row(Stored* target, const E* row, int64_t width) {
    Max top;
    sweep(width, [&](auto i) { top.add(abs(load(row, i)), i); });
    const float limit = largest_code(Stored{}), scale = top.total() / limit;
    memcpy((void*)target, &scale, sizeof scale);
    Stored* codes = target + sizeof(float);
    if (!(scale > 0.0f && scale < INFINITY)) {
        memset((void*)codes, 0, (size_t)width);
        return;
    }
    sweep(width, [&](auto i) {
        const Floats quotient = maximum(minimum(load(row, i) / scale, limit), -limit);
        const UnsignedBytes bytes = code_of(quotient, Stored{});
        if constexpr (std::is_same_v<decltype(i), Block>)
            memcpy((void*)(codes + i.at), &bytes, sizeof bytes);
        else
            memcpy((void*)(codes + i.at), &bytes, (size_t)i.count);
    });
}

// A row of the cache that a kernel writes, element by element, to `at`. A row of codes is stored when it is complete,
// as this object is destroyed. `number` distinguishes the rows that a kernel writes at the same time.
template <class E, class Stored>
class KvRow {
  public:
    KvRow(Stored* target, int64_t width, int number)
        : at(scratch<E>((Scratch)((int)Scratch::KV_ROWS + number), width)), target_(target), width_(width) {}
    KvRow(const KvRow&) = delete;
    ~KvRow() { encode_row(target_, at, width_); }

    E* const at;

  private:
    Stored* const target_;
    const int64_t width_;
};
template <class E>
class KvRow<E, E> {
  public:
    KvRow(E* target, int64_t, int) : at(target) {}

    E* const at;
};

}  // namespace sage
