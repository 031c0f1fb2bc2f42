// Microkernel of bf16 in vector registers: AVX512_BF16 multiplies pairs along K.
//
// Up to 16 rows are multiplied with one panel after another, so that the weight is a single stream of memory, and each
// pair along K prefetches one line, AHEAD bytes further on: of many prefetches at a time some are lost, because a core
// has few buffers for them. Tiles of more rows are 6 rows by 4 panels, and their block goes through K in parts, which
// all of its tiles multiply in turn: a part of the panels is read from memory once and then found in the L1 cache, and
// each tile prefetches some of the next part, one line with each step, so that reading and multiplying overlap. Sums
// between two parts are stored as they are, so that both kinds of blocks add the same products in the same order.
// Prepared x: [rows][K], K padded with zeros, rows `row_stride` apart.
#pragma once

#include <utility>

#include "microkernel.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace sage {
namespace pairs {

constexpr int COLUMN_ROWS = 16;     // a sum of each in a register, and multiplications as fast as loads of x
constexpr int64_t AHEAD = 8192;     // bytes: 190 ns at 43 GB/s, longer than a core waits for memory
constexpr int64_t BLOCK_ROWS = 32;  // their sums, 8 KB, stay in the L1 cache
constexpr int64_t PART = 192;       // elements of K; 4 panels of two parts are 48 KB, an L1 cache
static_assert(BLOCK_ROWS * 4 * PANEL <= MAX_SUMS, "a block has at most MAX_SUMS sums");
static_assert(PART % DEPTH == 0, "parts consist of whole steps");

// Elements from a prepared row to the next: an odd number of cache lines, so that the rows are in different sets of the
// L1 cache.
inline int64_t row_stride(int64_t K) { return round_up(K, DEPTH) | DEPTH; }
static_assert(DEPTH * sizeof(bf16) == 64, "a step of K is a cache line");

inline void copy_rows(void* prepared, const bf16* const* x, int64_t rows, int64_t K, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row) {
        bf16* out = (bf16*)prepared + row * stride;
        memcpy((void*)out, x[row], K * sizeof(bf16));
        memset((void*)(out + K), 0, (round_up(K, DEPTH) - K) * sizeof(bf16));
    }
}

inline void prepare(void* prepared, const bf16* const* x, int64_t rows, int64_t K) {
    copy_rows(prepared, x, rows, K, row_stride(K));
}

inline __m512bh broadcast_pair(const bf16* x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// Adds a pair along K of some rows of x, which are `stride` apart, times panels that are `panel` apart.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_pair(__m512 (&sum)[ROWS][PANELS], const bf16* x, int64_t stride,
                                                    const bf16* w, int64_t panel) {
    __m512bh read[PANELS];
#pragma GCC unroll 4
    for (int64_t p = 0; p < PANELS; ++p) read[p] = (__m512bh)_mm512_loadu_si512(w + p * panel);
#pragma GCC unroll 16
    for (int64_t row = 0; row < ROWS; ++row) {
        const __m512bh pair = broadcast_pair(x + row * stride);
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) sum[row][p] = _mm512_dpbf16_ps(sum[row][p], read[p], pair);
    }
}

// Rows of sums are `stride` apart. Single stores: a copy of all of them would be a call.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void store_sums(float* sums, int64_t stride, const __m512 (&sum)[ROWS][PANELS]) {
#pragma GCC unroll 16
    for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) _mm512_store_ps(sums + row * stride + p * PANEL, sum[row][p]);
}

// All of K, of panels that are in the caches.
template <int ROWS, int PANELS>
__attribute__((noinline)) void whole_tile(float* sums, const bf16* x, int64_t K, const bf16* w) {
    __m512 sum[ROWS][PANELS] = {};
    for (int64_t k = 0; k < K; k += 2, w += PANEL * 2) add_pair(sum, x + k, K, w, K * PANEL);
    store_sums(sums, PANELS * PANEL, sum);
}

// All of K, of a panel in memory. Rows of sums are `stride` apart. An address of x is one of a few pointers plus one to
// three strides, as there are not enough registers for a pointer to each row.
template <int ROWS>
__attribute__((noinline)) void column_tile(float* sums, int64_t stride, const bf16* x, int64_t K, const bf16* w) {
    const int64_t x_stride = row_stride(K);
    constexpr int GROUP = 4, GROUPS = (ROWS + GROUP - 1) / GROUP;
    __m512 sum[ROWS][1] = {};
    const bf16* rows[GROUPS];
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) rows[g] = x + g * GROUP * x_stride;
    for (int64_t k = 0; k < K; k += 2, w += PANEL * 2) {
        __builtin_prefetch((const char*)w + AHEAD, 0, 3);
        const __m512bh read = (__m512bh)_mm512_loadu_si512(w);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const bf16* pair = rows[row / GROUP] + row % GROUP * x_stride;
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], read, broadcast_pair(pair));
        }
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) rows[g] += 2;
    }
    store_sums(sums, stride, sum);
}

using ColumnTile = void (*)(float*, int64_t, const bf16*, int64_t, const bf16*);

template <size_t... I>
inline ColumnTile column_tile_of(int64_t rows, std::index_sequence<I...>) {
    static constexpr ColumnTile table[] = {column_tile<I + 1>...};
    return table[rows - 1];
}

// Elements `first` to `last` of K. Each pair prefetches the next line at `ahead`, and the one `apart` bytes further on.
template <int ROWS, int PANELS>
__attribute__((noinline)) void part_tile(float* sums, const bf16* x, int64_t K, const bf16* w, Range part,
                                         const char* ahead, int64_t apart) {
    const int64_t stride = row_stride(K);
    __m512 sum[ROWS][PANELS];
#pragma GCC unroll 16
    for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p)
            sum[row][p] = part.first ? _mm512_load_ps(sums + (row * PANELS + p) * PANEL) : _mm512_setzero_ps();
    for (int64_t k = part.first; k < part.last; k += 2, ahead += 64) {
        __builtin_prefetch(ahead, 0, 3);
        __builtin_prefetch(ahead + apart, 0, 3);
        add_pair(sum, x + k, stride, w + k * PANEL, K * PANEL);
    }
    store_sums(sums, PANELS * PANEL, sum);
}

// For attention: sums times a factor per row, plus products of numbers that are split into two bf16 each, `upper` and
// `lower`. Rows of sums are `stride` apart.
template <int ROWS, int PANELS>
__attribute__((noinline)) void split_tile(float* sums, int64_t stride, const float* factors, const bf16* upper,
                                          const bf16* lower, int64_t K, const bf16* w) {
    __m512 sum[ROWS][PANELS];
#pragma GCC unroll 16
    for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p)
            sum[row][p] = _mm512_mul_ps(_mm512_load_ps(sums + row * stride + p * PANEL), _mm512_set1_ps(factors[row]));
    for (int64_t k = 0; k < K; k += 2, w += PANEL * 2) {
        add_pair(sum, upper + k, K, w, K * PANEL);
        add_pair(sum, lower + k, K, w, K * PANEL);
    }
    store_sums(sums, stride, sum);
}

// One function per number of rows and panels: all loop bounds are constants, so the sums of a tile stay in registers.
template <int ROWS, int PANELS>
struct Tiles {
    using Whole = void (*)(float*, const bf16*, int64_t, const bf16*);
    using Part = void (*)(float*, const bf16*, int64_t, const bf16*, Range, const char*, int64_t);
    using Split = void (*)(float*, int64_t, const float*, const bf16*, const bf16*, int64_t, const bf16*);
    struct Tile {
        Whole whole;
        Part part;
        Split split;
    };

    template <size_t... I>
    static const Tile& at(int64_t index, std::index_sequence<I...>) {
        static constexpr Tile table[] = {{whole_tile<I / PANELS + 1, I % PANELS + 1>,
                                          part_tile<I / PANELS + 1, I % PANELS + 1>,
                                          split_tile<I / PANELS + 1, I % PANELS + 1>}...};
        return table[index];
    }
    static const Tile& of(int64_t rows, int64_t panels) {
        return at((rows - 1) * PANELS + panels - 1, std::make_index_sequence<ROWS * PANELS>{});
    }

    // For attention: prepared rows times some panels, which are in the caches.
    static void multiply(float* sums, const bf16* x, int64_t rows, int64_t K, const bf16* w, int64_t panels) {
        const int64_t tiles = (rows + ROWS - 1) / ROWS;
        for (int64_t t = 0; t < tiles; ++t) {
            const Range range = split_range(rows, 1, t, tiles);
            of(range.count(), panels).whole(sums + range.first * panels * PANEL, x + range.first * K, K, w);
        }
    }
    static void add_split(float* sums, int64_t stride, const float* factors, const bf16* upper, const bf16* lower,
                          int64_t rows, int64_t K, const bf16* w, int64_t panels) {
        const int64_t tiles = (rows + ROWS - 1) / ROWS;
        for (int64_t t = 0; t < tiles; ++t) {
            const Range range = split_range(rows, 1, t, tiles);
            const int64_t at = range.first * K;
            of(range.count(), panels)
                .split(sums + range.first * stride, stride, factors + range.first, upper + at, lower + at, K, w);
        }
    }

    static void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, const bf16* w,
                      int64_t panels, Prefetch) {
        const int64_t padded = round_up(K, DEPTH), parts = (padded + PART - 1) / PART;
        const int64_t stride = row_stride(K);
        const bf16* x = (const bf16*)prepared + first * stride;
        if (rows <= COLUMN_ROWS) {
            const ColumnTile tile = column_tile_of(rows, std::make_index_sequence<COLUMN_ROWS>{});
            for (int64_t p = 0; p < panels; ++p)
                tile(sums + p * PANEL, panels * PANEL, x, padded, w + p * padded * PANEL);
            return;
        }
        const int64_t tiles = (rows + ROWS - 1) / ROWS;
        const int64_t streams = tiles < panels ? 2 : 1;  // panels that a tile prefetches: all panels by all tiles
        const int64_t size = padded * PANEL;
        for (int64_t i = 0; i < parts; ++i) {
            const Range part = split_range(padded, DEPTH, i, parts);
            const bf16* next = part.last < padded ? w + part.last * PANEL : w + panels * size;  // the next block's
            for (int64_t t = 0; t < tiles; ++t) {
                const Range range = split_range(rows, 1, t, tiles);
                const int64_t panel = maximum((int64_t)0, minimum(t * streams, panels - streams));
                of(range.count(), panels)
                    .part(sums + range.first * panels * PANEL, x + range.first * stride, padded, w, part,
                          (const char*)(next + panel * size), (streams - 1) * size * (int64_t)sizeof(bf16));
            }
        }
    }
};

template <int ROWS, int PANELS>
constexpr Microkernel<bf16> MICROKERNEL = {{{ANY_ROWS, BLOCK_ROWS, PANELS}},
                                           1,
                                           sizeof(bf16),
                                           do_nothing,
                                           do_nothing,
                                           prepare,
                                           Tiles<ROWS, PANELS>::block,
                                           "AVX512_BF16"};

}  // namespace pairs
}  // namespace sage
#endif
