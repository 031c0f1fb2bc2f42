// Operations on 16 vectors at once: a transpose, and the maximum of each, in log2(16) rounds of exchanges.
#pragma once

#include "loops.h"

namespace sage {

// One exchange between two vectors: `low` has the lanes without bit WIDTH in their number, of `lower` at the same lanes
// and of `upper` at the lanes with that bit; `high` has the other lanes.
struct LanePair {
    Floats low, high;
};
template <int WIDTH>
inline LanePair exchange(Floats lower, Floats upper) {
    const Ints is_upper = (LANE_NUMBERS & WIDTH) != 0, other = LANE_NUMBERS ^ WIDTH;
    const Ints low_lanes = is_upper ? other + LANES : LANE_NUMBERS,
               high_lanes = is_upper ? LANE_NUMBERS + LANES : other;
#if defined(__AVX512F__)
    return {(Floats)_mm512_permutex2var_ps((__m512)lower, (__m512i)low_lanes, (__m512)upper),
            (Floats)_mm512_permutex2var_ps((__m512)lower, (__m512i)high_lanes, (__m512)upper)};
#else
    LanePair result;
    for (int lane = 0; lane < LANES; ++lane) {
        result.low[lane] = low_lanes[lane] < LANES ? lower[low_lanes[lane]] : upper[low_lanes[lane] - LANES];
        result.high[lane] = high_lanes[lane] < LANES ? lower[high_lanes[lane]] : upper[high_lanes[lane] - LANES];
    }
    return result;
#endif
}

template <int WIDTH>
inline void exchange_rows(Floats* row) {
    for (int i = 0; i < LANES; ++i) {
        if (i & WIDTH) continue;
        const LanePair pair = exchange<WIDTH>(row[i], row[i + WIDTH]);
        row[i] = pair.low;
        row[i + WIDTH] = pair.high;
    }
}
#if defined(__AVX512F__)
// Exchanges of words within and between parts of four lanes, which take half the time of general permutations.
inline void transpose(Floats* row) {
    __m512 pair[LANES], four[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        pair[i] = _mm512_unpacklo_ps((__m512)row[i], (__m512)row[i + 1]);
        pair[i + 1] = _mm512_unpackhi_ps((__m512)row[i], (__m512)row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512d a = (__m512d)pair[i + j], b = (__m512d)pair[i + 2 + j];
            four[i + 2 * j] = (__m512)_mm512_unpacklo_pd(a, b);
            four[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(a, b);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // `four[4 * i + j]` has lanes j, 4 + j, 8 + j and 12 + j of rows 4 * i to 4 * i + 3
        const __m512 even = _mm512_shuffle_f32x4(four[j], four[4 + j], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(four[j], four[4 + j], 0xdd);
        const __m512 last_even = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x88);
        const __m512 last_odd = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xdd);
        row[j] = (Floats)_mm512_shuffle_f32x4(even, last_even, 0x88);
        row[4 + j] = (Floats)_mm512_shuffle_f32x4(odd, last_odd, 0x88);
        row[8 + j] = (Floats)_mm512_shuffle_f32x4(even, last_even, 0xdd);
        row[12 + j] = (Floats)_mm512_shuffle_f32x4(odd, last_odd, 0xdd);
    }
}
#else
inline void transpose(Floats* row) {
    exchange_rows<8>(row);
    exchange_rows<4>(row);
    exchange_rows<2>(row);
    exchange_rows<1>(row);
}
#endif

// The maximum as one instruction: returns the second operand if either is NaN.
#if defined(__AVX512F__)
inline Floats hardware_max(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
#else
inline Floats hardware_max(Floats a, Floats b) { return a > b ? a : b; }
#endif

template <int WIDTH>
inline void fold_rows(Floats* row) {
    for (int i = 0; i < WIDTH; ++i) {
        const LanePair pair = exchange<WIDTH>(row[i], row[i + WIDTH]);
        row[i] = hardware_max(pair.low, pair.high);
    }
}
// The largest lane of each of the 16 rows, which it overwrites.
inline Floats max_of_rows(Floats* row) {
    fold_rows<8>(row);
    fold_rows<4>(row);
    fold_rows<2>(row);
    fold_rows<1>(row);
    return row[0];
}

}  // namespace sage
