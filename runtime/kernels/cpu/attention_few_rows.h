// Products of a few query rows with keys and values that stay where they are, for AVX512_BF16: a decode of one key head
// has as many rows as query heads share it, so that packing 64 keys and values costs more than multiplying them.
//
// Keys are transposed in registers, 16 keys by 32 elements at a time, and multiplied at once. Two rows of values become
// pairs in registers, in an order of columns that the sums take on as well. The products of a row are added in the same
// order as with packed operands, so that the bits are the same.
#pragma once

#include "attention_gemm_f32.h"
#include "microkernel_pairs.h"

#if defined(__AVX512BF16__)
namespace sage {

const __m512i FIRST_LANES = {0, 1, 8, 9, 2, 3, 10, 11}, LAST_LANES = {4, 5, 12, 13, 6, 7, 14, 15};

// The mask of the 32 elements from `at` on that a row of `length` elements has.
inline __mmask32 active_lanes(int64_t at, int64_t length) {
    return length - at < DEPTH ? (1u << (length - at)) - 1 : ~0u;
}

// 32 elements, zero outside of the mask.
inline __m512i load_pairs(__mmask32 columns, const bf16* row) { return _mm512_maskz_loadu_epi16(columns, row); }

namespace few_rows {

constexpr int64_t MAX_ROWS = 6;  // with 4 vectors of sums for each row, operands fit into 32 registers

// The keys or values of a step, as pointers to their rows, and the rows that are prefetched meanwhile, each of them
// line by line: memory is slower if lines of different rows take turns. Rows of which two steps do not fit into the L1
// cache are prefetched to the L2 cache.
struct Operand {
    const bf16* const* row;
    RowPrefetch ahead;
    int64_t width;

    bool fits_l1() const { return 4 * KEYS * ahead.row_bytes() <= 32 * 1024; }
};

// Prefetches so many lines.
inline void prefetch(RowPrefetch& ahead, bool to_l1, int64_t lines) {
    if (to_l1)
        ahead.lines(lines);
    else
        ahead.lines<2>(lines);
}

// scores[ROWS, KEYS] = queries[ROWS, depth] keys[KEYS, width]^T; queries are padded with zeros to `depth`. Sums of four
// panels of keys take turns, so that the products of one need not wait for each other.
template <int ROWS>
__attribute__((noinline)) void multiply_keys(float* scores, const bf16* queries, int64_t depth, Operand keys) {
    RowPrefetch ahead = keys.ahead;
    const bool to_l1 = keys.fits_l1();
    for (int64_t at = 0; at < depth; at += DEPTH) {
        const __mmask32 columns = active_lanes(at, keys.width);
        for (int64_t key = 0; key < KEYS; key += PANEL) {
            Floats words[LANES];
#pragma GCC unroll 16
            for (int64_t lane = 0; lane < LANES; ++lane) {
                words[lane] = (Floats)load_pairs(columns, keys.row[key + lane] + at);
                if (lane % 4 == 3) prefetch(ahead, to_l1, 4);
            }
            transpose(words);
            __m512 sum[ROWS];
#pragma GCC unroll 6
            for (int64_t r = 0; r < ROWS; ++r)
                sum[r] = at ? _mm512_load_ps(scores + r * KEYS + key) : _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int64_t pair = 0; pair < LANES; ++pair)
#pragma GCC unroll 6
                for (int64_t r = 0; r < ROWS; ++r)
                    sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)words[pair],
                                              pairs::broadcast_pair(queries + r * depth + at + 2 * pair));
#pragma GCC unroll 6
            for (int64_t r = 0; r < ROWS; ++r) _mm512_store_ps(scores + r * KEYS + key, sum[r]);
        }
    }
}

// sums[ROWS, width] = sums * factors + (upper + lower)[ROWS, KEYS] values[KEYS, width], 32 * CHUNKS columns at a time.
template <int ROWS, int CHUNKS>
__attribute__((noinline)) void add_values(float* sums, int64_t stride, const float* factors, const bf16* upper,
                                          const bf16* lower, Operand values) {
    RowPrefetch ahead = values.ahead;
    const bool to_l1 = values.fits_l1();
    for (int64_t at = 0; at < stride; at += CHUNKS * DEPTH) {
        __m512 sum[ROWS][CHUNKS][2];
#pragma GCC unroll 6
        for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int64_t c = 0; c < CHUNKS; ++c) {
                const float* from = sums + r * stride + at + c * DEPTH;
                const __m512 factor = _mm512_set1_ps(factors[r]);
                const __m512 a = _mm512_mul_ps(_mm512_load_ps(from), factor);
                const __m512 b = _mm512_mul_ps(_mm512_load_ps(from + LANES), factor);
                sum[r][c][0] = _mm512_shuffle_f32x4(a, b, 0x88);
                sum[r][c][1] = _mm512_shuffle_f32x4(a, b, 0xdd);
            }
        for (int64_t i = 0; i < KEYS / 2; ++i) {
            const int64_t key = i / PANEL * DEPTH + i % PANEL;
            __m512bh read[CHUNKS][2];
#pragma GCC unroll 2
            for (int64_t c = 0; c < CHUNKS; ++c) {
                const __mmask32 columns = active_lanes(at + c * DEPTH, values.width);
                const __m512i a = load_pairs(columns, values.row[key] + at + c * DEPTH);
                const __m512i b = load_pairs(columns, values.row[key + PANEL] + at + c * DEPTH);
                prefetch(ahead, to_l1, 2);
                read[c][0] = (__m512bh)_mm512_unpacklo_epi16(a, b);
                read[c][1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
            }
#pragma GCC unroll 6
            for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
                for (const bf16* weights : {upper, lower}) {
                    const __m512bh weight = pairs::broadcast_pair(weights + r * KEYS + 2 * i);
#pragma GCC unroll 2
                    for (int64_t c = 0; c < CHUNKS; ++c)
#pragma GCC unroll 2
                        for (int64_t half = 0; half < 2; ++half)
                            sum[r][c][half] = _mm512_dpbf16_ps(sum[r][c][half], read[c][half], weight);
                }
        }
#pragma GCC unroll 6
        for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int64_t c = 0; c < CHUNKS; ++c) {
                float* to = sums + r * stride + at + c * DEPTH;
                const __m512d a = (__m512d)sum[r][c][0], b = (__m512d)sum[r][c][1];
                _mm512_store_pd(to, _mm512_permutex2var_pd(a, FIRST_LANES, b));
                _mm512_store_pd(to + LANES, _mm512_permutex2var_pd(a, LAST_LANES, b));
            }
    }
}

using Keys = void (*)(float*, const bf16*, int64_t, Operand);
using Values = void (*)(float*, int64_t, const float*, const bf16*, const bf16*, Operand);

// The functions for 1 to MAX_ROWS rows, and for widths of an odd or an even number of 32 columns.
template <size_t... I>
inline Keys keys_of(int64_t rows, std::index_sequence<I...>) {
    static constexpr Keys table[] = {multiply_keys<I + 1>...};
    return table[rows - 1];
}
template <size_t... I>
inline Values values_of(int64_t rows, int64_t width, std::index_sequence<I...>) {
    static constexpr Values table[][2] = {{add_values<I + 1, 1>, add_values<I + 1, 2>}...};
    return table[rows - 1][width % (2 * DEPTH) == 0];
}
using Rows = std::make_index_sequence<MAX_ROWS>;

}  // namespace few_rows
}  // namespace sage
#endif
