// Blocks by AMX tiles: 16x16 sums from 16 rows of x and 16 columns of a panel, 32 elements of K at a time.
//
// Prepared x: [ceil(rows/16)][K/32] tiles of [16][32], so that a tile is 1 KB of memory and rows beyond the last are zero.
#pragma once

#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define SAGE_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace sage {
namespace amx {

constexpr int64_t ROWS = 16, TILE = ROWS * DEPTH;

// The kernel hands out the tiles' 8 KB of state to processes that ask for it.
inline bool is_permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// All tiles alike: 16 rows of 64 bytes. It is constant memory, as the compiler does not know that the instruction reads it.
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
        bf16* place = (bf16*)prepared + row / ROWS * steps * TILE + row % ROWS * DEPTH;
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t count = row >= rows ? 0 : s < whole ? DEPTH : K - whole * DEPTH;
            if (count < DEPTH) memset((void*)(place + s * TILE), 0, DEPTH * sizeof(bf16));
            if (count > 0) memcpy((void*)(place + s * TILE), x[row] + s * DEPTH, count * sizeof(bf16));
        }
    }
}

// 16 rows by up to four panels
template <int PANELS>
inline void few(float* sums, const bf16* x, int64_t steps, const bf16* w, Ahead ahead) {
    const int64_t panel = steps * TILE;
    _tile_zero(0);
    if constexpr (PANELS > 1) _tile_zero(1);
    if constexpr (PANELS > 2) _tile_zero(2);
    if constexpr (PANELS > 3) _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s, x += TILE, w += TILE) {
        fetch(ahead);
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

// 32 rows by up to two panels. The weights pass the nearest cache by, as it is to keep the rows: the next block wants them.
template <int PANELS>
inline void many(float* sums, const bf16* x, int64_t steps, const bf16* w, Ahead ahead) {
    const int64_t panel = steps * TILE;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (PANELS > 1) _tile_zero(2);
    if constexpr (PANELS > 1) _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s, x += TILE, w += TILE) {
        fetch(ahead);
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
                  int64_t panels, Ahead ahead) {
    int64_t steps = round_up(K, DEPTH) / DEPTH;
    const bf16* x = (const bf16*)prepared + first * steps * DEPTH;
    if (rows > ROWS) return panels > 1 ? many<2>(sums, x, steps, w, ahead) : many<1>(sums, x, steps, w, ahead);
    switch (panels) {
        case 1: return few<1>(sums, x, steps, w, ahead);
        case 2: return few<2>(sums, x, steps, w, ahead);
        case 3: return few<3>(sums, x, steps, w, ahead);
        default: return few<4>(sums, x, steps, w, ahead);
    }
}

constexpr Way<bf16> WAY = {2 * ROWS, 2, ROWS, 4, ROWS, sizeof(bf16), begin, end, prepare, block};

}  // namespace amx
}  // namespace sage
#endif
