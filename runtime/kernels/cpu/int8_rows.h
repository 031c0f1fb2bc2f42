// Activations of 8 bits: rows of x as int8 codes, with a scale for each 32 inputs.
//
// The numerics are those of the op `int8_activations` in specs/ops/quantization.yaml: scale = amax / 127, and a code is
// the nearest integer of x / scale, so that a value is wrong by at most scale / 2. Rows are quantised when a GEMM
// prepares them, and its sums of up to 32 products are exact, so that a result depends on nothing but its row and the
// weight: neither on the batch nor on the instruction set.
#pragma once

#include "coded.h"
#include "functions.h"

namespace sage {
namespace int8_rows {

constexpr int64_t CHUNK = 128;           // inputs of a group that are added before the weight's scale, at most
constexpr float LEAST_AMAX = 0x1p-100f;  // smaller rows become zeros

// 32 elements of a row. `Code` holds integers from -127 to 127.
template <class Code>
struct alignas(32) Block {
    Code codes[DEPTH];
    float scale;        // NaN if an element is not finite
    float sums[3];      // of the values of the halves and of all
    int32_t starts[3];  // of the codes of these, times minus the center of the weight
};
template <class Code>
constexpr int64_t BYTES = sizeof(Block<Code>) / DEPTH;  // per element
static_assert(sizeof(Block<int8_t>) == 2 * DEPTH && sizeof(Block<float>) == 5 * DEPTH, "blocks have no odd bytes");

inline float amax_of(Floats low, Floats high) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps((__m512)low), _mm512_abs_ps((__m512)high)));
#else
    float most = 0;
    for (int64_t lane = 0; lane < LANES; ++lane)
        most = maximum(most, maximum(__builtin_fabsf(low[lane]), __builtin_fabsf(high[lane])));
    return most;
#endif
}

// Whether x - x is 0 everywhere: it is NaN for NaN and infinities.
inline bool is_finite(Floats low, Floats high) {
    const Floats odd = (low - low) + (high - high);
#if defined(__AVX512F__)
    return !_mm512_cmp_ps_mask((__m512)odd, (__m512)odd, _CMP_UNORD_Q);
#else
    for (int64_t lane = 0; lane < LANES; ++lane)
        if (odd[lane] != 0) return false;
    return true;
#endif
}

inline int32_t store_codes(int8_t* to, Floats rounded) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)rounded));
    _mm_storeu_si128((__m128i*)to, bytes);
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8((char)0x80)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - LANES * 128;
#else
    int32_t sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += to[lane] = (int8_t)rounded[lane];
    return sum;
#endif
}
inline int32_t store_codes(float* to, Floats rounded) {
    memcpy(to, &rounded, sizeof rounded);
    int32_t sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += (int32_t)rounded[lane];
    return sum;
}

template <class Code>
inline void quantise(Block<Code>& out, Floats low, Floats high, int32_t center) {
    const float most = amax_of(low, high);
    const bool is_usable = is_finite(low, high);
    const float scale = (most > LEAST_AMAX ? most : LEAST_AMAX) / 127.0f, inverse = is_usable ? 1.0f / scale : 0.0f;
    if (!is_usable) low = high = Floats{};
    const int32_t sums[] = {store_codes(out.codes, round(low * inverse)),
                            store_codes(out.codes + LANES, round(high * inverse))};
    out.scale = is_usable ? scale : NAN;
    for (int64_t half = 0; half < 2; ++half) {
        out.sums[half] = (float)sums[half] * out.scale;
        out.starts[half] = -center * sums[half];
    }
    out.sums[2] = (float)(sums[0] + sums[1]) * out.scale;
    out.starts[2] = out.starts[0] + out.starts[1];
}

template <class Weight, class Code, class Element>
inline void prepare(void* prepared, const Element* const* x, int64_t rows, int64_t K) {
    const int64_t blocks = round_up(K, DEPTH) / DEPTH;
    Block<Code>* out = (Block<Code>*)prepared;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < blocks; ++i, ++out) {
            const Element* from = x[row] + i * DEPTH;
            const int64_t left = K - i * DEPTH;
            if (left >= DEPTH)
                quantise(*out, load(from, sage::Block{0}), load(from, sage::Block{16}), (int32_t)Weight::CENTER);
            else
                quantise(*out, load(from, Tail{0, left < 16 ? left : 16}),
                         load(from, Tail{16, left > 16 ? left - 16 : 0}), (int32_t)Weight::CENTER);
        }
}

// The next inputs from k on with equal scales of the weight, CHUNK of them at most.
inline int64_t num_inputs(int64_t k, int64_t padded, int64_t group) {
    const int64_t left = group - k % group, most = left < CHUNK ? left : CHUNK;
    return most < padded - k ? most : padded - k;
}

}  // namespace int8_rows
}  // namespace sage
