// Softmax state of query rows over the keys so far: an online softmax (Milakov & Gimelshein 2018), in powers of two.
#pragma once

#include "transpose.h"

namespace sage {

constexpr float LOG2_E = 1.44269504f;

// 2^x, to a relative error below 1.5e-7; 2^0 is exactly 1. Subnormal results are 0, as are those of masked keys: the
// weights are too small to matter, and processors take long over subnormals.
inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
    const Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const Floats whole = floor(hardware_max(minimum(x, 127.0f), broadcast(-126.0f))), rest = minimum(x, 127.0f) - whole;
#endif
    Floats p = fma(broadcast(1.867130411e-3f), rest, broadcast(9.017029597e-3f));
    p = fma(p, rest, broadcast(5.579991362e-2f));
    p = fma(p, rest, broadcast(2.401644500e-1f));
    p = fma(p, rest, broadcast(6.931513118e-1f));
    p = fma(p, rest, broadcast(1.0f));
#if defined(__AVX512F__)
    p = (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    p *= power_of_two(__builtin_convertvector(whole, Ints));
#endif
    return x < -126.0f ? Floats{} : p;
}
inline float exp2(float x) { return exp2(broadcast(x))[0]; }

// The shift that is subtracted from scores under a maximum. A row without visible keys so far has 0, because -inf -
// -inf is NaN whereas 2^-inf is 0.
inline Floats shift_of(Floats maximum) { return maximum == -INFINITY ? Floats{} : maximum; }

// Per row the largest exponent, the sum of the powers in 16 lanes, and the weighted sum of the values; in blocks of 16
// rows.
struct SoftmaxState {
    float* maximum;
    float* total;   // [rows, LANES]
    float* values;  // [rows, width]

    void reset(int64_t rows, int64_t width) {
        for (int64_t r = 0; r < round_up(rows, LANES); ++r) maximum[r] = -INFINITY;
        memset(total, 0, (size_t)(rows * LANES) * sizeof(float));
        memset(values, 0, (size_t)(rows * width) * sizeof(float));
    }

    // Adds the state of later keys; both are rescaled to the larger maximum.
    void merge(const SoftmaxState& later, int64_t rows, int64_t width) {
        for (int64_t r = 0; r < rows; ++r) {
            const Floats before = broadcast(maximum[r]), after = broadcast(later.maximum[r]);
            const Floats top = hardware_max(before, after);
            const Floats scale = exp2(before - shift_of(top)), later_scale = exp2(after - shift_of(top));
            maximum[r] = top[0];
            add_scaled(total + r * LANES, scale, later.total + r * LANES, later_scale, LANES);
            add_scaled(values + r * width, scale, later.values + r * width, later_scale, width);
        }
    }

    static int64_t floats(int64_t rows, int64_t width) { return round_up(rows, LANES) * (1 + LANES + width); }
    static SoftmaxState at(float* memory, int64_t rows) {
        float* total = memory + round_up(rows, LANES);
        return {memory, total, total + round_up(rows, LANES) * LANES};
    }

  private:
    static void add_scaled(float* sums, Floats scale, const float* later_sums, Floats later_scale, int64_t count) {
        for (int64_t at = 0; at < count; at += LANES)
            store(sums, Block{at}, load(sums, Block{at}) * scale + load(later_sums, Block{at}) * later_scale);
    }
};

}  // namespace sage
