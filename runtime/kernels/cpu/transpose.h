// Sixteen vectors at once: with rows and columns swapped, or each folded to one number, by rounds that halve distances.
#pragma once

#include "loops.h"

namespace sage {

// Of two vectors, by bit WIDTH of the lane: `a` has the lanes without it of both, the second one's where they have it;
// `b` has what `a` lacks.
struct Halved {
    Floats a, b;
};
template <int WIDTH>
inline Halved halved(Floats lower, Floats upper) {
    const Ints is_upper = (LANE_NUMBERS & WIDTH) != 0, other = LANE_NUMBERS ^ WIDTH;
    const Ints low = is_upper ? other + LANES : LANE_NUMBERS, high = is_upper ? LANE_NUMBERS + LANES : other;
#if defined(__AVX512F__)
    return {(Floats)_mm512_permutex2var_ps((__m512)lower, (__m512i)low, (__m512)upper),
            (Floats)_mm512_permutex2var_ps((__m512)lower, (__m512i)high, (__m512)upper)};
#else
    Halved result;
    for (int lane = 0; lane < LANES; ++lane) {
        result.a[lane] = low[lane] < LANES ? lower[low[lane]] : upper[low[lane] - LANES];
        result.b[lane] = high[lane] < LANES ? lower[high[lane]] : upper[high[lane] - LANES];
    }
    return result;
#endif
}

template <int WIDTH>
inline void swap_halves(Floats* row) {
    for (int i = 0; i < LANES; ++i) {
        if (i & WIDTH) continue;
        const Halved pair = halved<WIDTH>(row[i], row[i + WIDTH]);
        row[i] = pair.a;
        row[i + WIDTH] = pair.b;
    }
}
inline void transpose(Floats* row) {
    swap_halves<8>(row);
    swap_halves<4>(row);
    swap_halves<2>(row);
    swap_halves<1>(row);
}

// The larger of two, the second one if either is NaN: one instruction.
#if defined(__AVX512F__)
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
#else
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
#endif

template <int WIDTH>
inline void fold_halves(Floats* row) {
    for (int i = 0; i < WIDTH; ++i) {
        const Halved pair = halved<WIDTH>(row[i], row[i + WIDTH]);
        row[i] = larger(pair.a, pair.b);
    }
}
// The largest lane of each row; overwrites them.
inline Floats largest_of_rows(Floats* row) {
    fold_halves<8>(row);
    fold_halves<4>(row);
    fold_halves<2>(row);
    fold_halves<1>(row);
    return row[0];
}

}  // namespace sage
