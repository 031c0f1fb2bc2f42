// Microkernel on AMX tiles: 16x16 sums from 16 rows of x and 16 columns of a panel, 32 elements of K at a time.
//
// Prepared x: [ceil(rows/16)][K/32] tiles of [16][32], each 1 KB of contiguous memory; rows beyond the last are zero.
#pragma once

#include "microkernel.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define SAGE_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace sage {
namespace amx {

constexpr int64_t ROWS = 16, TILE = ROWS * DEPTH;

// Linux grants the 8 KB of tile state to processes that request it.
inline bool is_permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// The configuration of all tiles: 16 rows of 64 bytes. A constant, because the compiler does not know that the
// instruction reads it and would drop stores to a local one.
struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline const Config CONFIG;

inline void begin() { _tile_loadconfig(&CONFIG); }

inline void end() { _tile_release(); }

inline void prepare(void* prepared, const bf16* const* x, int64_t rows, int64_t K) {
    const int64_t steps = round_up(K, DEPTH) / DEPTH, whole = K / DEPTH;
    for (int64_t row = 0; row < round_up(rows, ROWS); ++row) {
        bf16* tile = (bf16*)prepared + row / ROWS * steps * TILE + row % ROWS * DEPTH;
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t count = row >= rows ? 0 : s < whole ? DEPTH : K - whole * DEPTH;
            if (count < DEPTH) memset((void*)(tile + s * TILE), 0, DEPTH * sizeof(bf16));
            if (count > 0) memcpy((void*)(tile + s * TILE), x[row] + s * DEPTH, count * sizeof(bf16));
        }
    }
}

// 16 rows by up to four panels: four of the eight tiles hold sums, one x and three weights, so that loads of weights,
// which limit a GEMM with few rows, overlap with the products.
template <int PANELS>
inline void gemm_narrow(float* sums, const bf16* x, int64_t steps, const bf16* w, Prefetch prefetch) {
    const int64_t panel = steps * TILE;
    _tile_zero(0);
    if constexpr (PANELS > 1) _tile_zero(1);
    if constexpr (PANELS > 2) _tile_zero(2);
    if constexpr (PANELS > 3) _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s, x += TILE, w += TILE) {
        prefetch_step(prefetch);
        _tile_loadd(4, x, 64);
        _tile_loadd(5, w, 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (PANELS > 1) {
            _tile_loadd(6, w + panel, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (PANELS > 2) {
            _tile_loadd(7, w + 2 * panel, 64);
            _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (PANELS > 3) {
            _tile_loadd(5, w + 3 * panel, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    constexpr int64_t STRIDE = PANELS * PANEL * sizeof(float);
    _tile_stored(0, sums, STRIDE);
    if constexpr (PANELS > 1) _tile_stored(1, sums + PANEL, STRIDE);
    if constexpr (PANELS > 2) _tile_stored(2, sums + 2 * PANEL, STRIDE);
    if constexpr (PANELS > 3) _tile_stored(3, sums + 3 * PANEL, STRIDE);
}

// 32 rows by up to two panels: each weight tile is used twice, which halves the loads per product. Streaming loads keep
// the weights out of the L1 cache: a block uses them once, whereas the next block reads the rows again.
template <int PANELS>
inline void gemm_wide(float* sums, const bf16* x, int64_t steps, const bf16* w, Prefetch prefetch) {
    const int64_t panel = steps * TILE;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (PANELS > 1) _tile_zero(2);
    if constexpr (PANELS > 1) _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s, x += TILE, w += TILE) {
        prefetch_step(prefetch);
        _tile_loadd(4, x, 64);
        _tile_stream_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, x + steps * TILE, 64);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (PANELS > 1) {
            _tile_stream_loadd(7, w + panel, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    constexpr int64_t STRIDE = PANELS * PANEL * sizeof(float);
    _tile_stored(0, sums, STRIDE);
    _tile_stored(1, sums + ROWS * PANELS * PANEL, STRIDE);
    if constexpr (PANELS > 1) _tile_stored(2, sums + PANEL, STRIDE);
    if constexpr (PANELS > 1) _tile_stored(3, sums + ROWS * PANELS * PANEL + PANEL, STRIDE);
}

inline void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, const bf16* w,
                  int64_t panels, Prefetch prefetch) {
    int64_t steps = round_up(K, DEPTH) / DEPTH;
    const bf16* x = (const bf16*)prepared + first * steps * DEPTH;
    if (rows > ROWS)
        return panels > 1 ? gemm_wide<2>(sums, x, steps, w, prefetch) : gemm_wide<1>(sums, x, steps, w, prefetch);
    switch (panels) {
        case 1: return gemm_narrow<1>(sums, x, steps, w, prefetch);
        case 2: return gemm_narrow<2>(sums, x, steps, w, prefetch);
        case 3: return gemm_narrow<3>(sums, x, steps, w, prefetch);
        default: return gemm_narrow<4>(sums, x, steps, w, prefetch);
    }
}

// For attention: 16 rows in place, `stride` elements apart, by one panel; K must be a multiple of DEPTH.
inline void gemm_strided(float* sums, const bf16* x, int64_t stride, int64_t K, const bf16* w) {
    _tile_zero(0);
    for (int64_t k = 0; k < K; k += DEPTH) {
        _tile_loadd(4, x + k, stride * sizeof(bf16));
        _tile_loadd(5, w + k * PANEL, 64);
        _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, sums, 64);
}

// For attention: 16 prepared rows of numbers that are split into two bf16 each, `upper` and `lower`, by up to four
// panels, added to sums with a row stride of `stride`.
template <int PANELS>
inline void add_split_panels(float* sums, int64_t stride, const bf16* upper, const bf16* lower, int64_t steps,
                             const bf16* w) {
    const int64_t panel = steps * TILE, bytes = stride * sizeof(float);
    _tile_loadd(0, sums, bytes);
    if constexpr (PANELS > 1) _tile_loadd(1, sums + PANEL, bytes);
    if constexpr (PANELS > 2) _tile_loadd(2, sums + 2 * PANEL, bytes);
    if constexpr (PANELS > 3) _tile_loadd(3, sums + 3 * PANEL, bytes);
    for (int64_t s = 0; s < steps; ++s, upper += TILE, lower += TILE, w += TILE) {
        _tile_loadd(4, upper, 64);
        _tile_loadd(5, lower, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(0, 5, 6);
        if constexpr (PANELS > 1) {
            _tile_loadd(7, w + panel, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(1, 5, 7);
        }
        if constexpr (PANELS > 2) {
            _tile_loadd(6, w + 2 * panel, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (PANELS > 3) {
            _tile_loadd(7, w + 3 * panel, 64);
            _tile_dpbf16ps(3, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, bytes);
    if constexpr (PANELS > 1) _tile_stored(1, sums + PANEL, bytes);
    if constexpr (PANELS > 2) _tile_stored(2, sums + 2 * PANEL, bytes);
    if constexpr (PANELS > 3) _tile_stored(3, sums + 3 * PANEL, bytes);
}

inline void add_split(float* sums, int64_t stride, const bf16* upper, const bf16* lower, int64_t steps, const bf16* w,
                      int64_t panels) {
    switch (panels) {
        case 1: return add_split_panels<1>(sums, stride, upper, lower, steps, w);
        case 2: return add_split_panels<2>(sums, stride, upper, lower, steps, w);
        case 3: return add_split_panels<3>(sums, stride, upper, lower, steps, w);
        default: return add_split_panels<4>(sums, stride, upper, lower, steps, w);
    }
}

constexpr Microkernel<bf16> MICROKERNEL = {
    {{ROWS, ROWS, 4}, {ANY_ROWS, 2 * ROWS, 2}}, ROWS, sizeof(bf16), begin, end, prepare, block, "AMX"};

}  // namespace amx
}  // namespace sage
#endif
