// What query rows have seen of their keys so far: a running softmax (Milakov & Gimelshein 2018), in powers of two.
#pragma once

#include "transpose.h"

namespace sage {

constexpr float LOG2_E = 1.44269504f;

// 2^x, to a relative error below 1.5e-7; 2^0 is 1. What would be subnormal is 0, as masked keys are: a processor takes long
// over subnormals.
inline Floats power(Floats x) {
#if defined(__AVX512F__)
    const Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const Floats whole = floor(larger(minimum(x, 127.0f), lanes(-126.0f))), rest = minimum(x, 127.0f) - whole;
#endif
    Floats p = fma(lanes(1.867130411e-3f), rest, lanes(9.017029597e-3f));
    p = fma(p, rest, lanes(5.579991362e-2f));
    p = fma(p, rest, lanes(2.401644500e-1f));
    p = fma(p, rest, lanes(6.931513118e-1f));
    p = fma(p, rest, lanes(1.0f));
#if defined(__AVX512F__)
    p = (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    p *= power_of_two(__builtin_convertvector(whole, Ints));
#endif
    return x < -126.0f ? Floats{} : p;
}
inline float power(float x) { return power(lanes(x))[0]; }

// What is subtracted from scores under a maximum. A row that sees nothing yet has 0, as 2^-inf is 0.
inline Floats shift_of(Floats maximum) { return maximum == -INFINITY ? Floats{} : maximum; }

// Per row the largest exponent, the sum of the powers in 16 lanes, and the values weighted by them; in blocks of 16 rows.
struct Seen {
    float* maximum;
    float* total;   // [rows, LANES]
    float* values;  // [rows, width]

    void clear(int64_t rows, int64_t width) {
        for (int64_t r = 0; r < round_up(rows, LANES); ++r) maximum[r] = -INFINITY;
        memset(total, 0, (size_t)(rows * LANES) * sizeof(float));
        memset(values, 0, (size_t)(rows * width) * sizeof(float));
    }

    void merge(const Seen& later, int64_t rows, int64_t width) {
        for (int64_t r = 0; r < rows; ++r) {
            const Floats before = lanes(maximum[r]), after = lanes(later.maximum[r]), top = larger(before, after);
            const Floats mine = power(before - shift_of(top)), theirs = power(after - shift_of(top));
            maximum[r] = top[0];
            add(total + r * LANES, mine, later.total + r * LANES, theirs, LANES);
            add(values + r * width, mine, later.values + r * width, theirs, width);
        }
    }

    static int64_t floats(int64_t rows, int64_t width) { return round_up(rows, LANES) * (1 + LANES + width); }
    static Seen at(float* memory, int64_t rows) {
        float* total = memory + round_up(rows, LANES);
        return {memory, total, total + round_up(rows, LANES) * LANES};
    }

   private:
    static void add(float* sums, Floats factor, const float* others, Floats their_factor, int64_t count) {
        for (int64_t at = 0; at < count; at += LANES)
            store(sums, Block{at}, load(sums, Block{at}) * factor + load(others, Block{at}) * their_factor);
    }
};

}  // namespace sage
