// Loops over rows and along them, reductions, and memory that is kept between calls.
#pragma once

#include "functions.h"
#include "team.h"

namespace sage {

constexpr int64_t PARALLEL_WORK = 32 * 1024;  // elements below which a second thread costs more than it helps

struct Range {
    int64_t first, last;
    int64_t count() const { return last - first; }
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Part `i` of `parts` of `count` things, which come in multiples of `step`.
inline Range share(int64_t count, int64_t step, int64_t i, int64_t parts) {
    const int64_t steps = (count + step - 1) / step;
    return {minimum(count, steps * i / parts * step), minimum(count, steps * (i + 1) / parts * step)};
}

// Rows, shared out between threads; each is computed by one thread in one order, so results do not depend on their number.
template <class Body>
inline void each_row(int64_t rows, int64_t elements, Body&& body) {
    const int64_t parts = num_parts(rows, elements / (PARALLEL_WORK / 2));
    each_part(parts, [&](int64_t part) {
        const Range own = share(rows, 1, part, parts);
        for (int64_t row = own.first; row < own.last; ++row) body(row);
    });
}

// Along a row: the body is called with whole blocks, then with the tail if there is one.
template <class Body>
inline void sweep(int64_t length, Body&& body) {
    int64_t at = 0;
    for (; at + LANES <= length; at += LANES) body(Block{at});
    if (at < length) body(Tail{at, length - at});
}

// The lanes of one vector, in a tree.

inline Floats turned(Floats value, int by) {
#if defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)(LANE_NUMBERS ^ by), (__m512)value);
#else
    Floats result;
    for (int lane = 0; lane < LANES; ++lane) result[lane] = value[lane ^ by];
    return result;
#endif
}
inline float sum_of_lanes(Floats value) {
    for (int by = LANES / 2; by > 0; by /= 2) value += turned(value, by);
    return value[0];
}
inline bool any(Ints condition) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#else
    int32_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= condition[lane];
    return found != 0;
#endif
}
inline float largest_lane(Floats value) {
    for (int by = LANES / 2; by > 0; by /= 2) value = maximum(value, turned(value, by));
    return value[0];
}

// Reductions add up lane by lane, and the lanes in a tree at the end: the order depends on the row's length alone.

struct Sum {
    Floats of_lanes = {};
    void add(Floats value, Block) { of_lanes += value; }
    void add(Floats value, Tail i) { of_lanes += inside(i) ? value : Floats{}; }
    template <class Place>
    void add(float value, Place i) {
        add(lanes(value), i);
    }
    float total() const { return sum_of_lanes(of_lanes); }
};

struct Max {
    Floats of_lanes = lanes(-INFINITY);
    void add(Floats value, Block) { of_lanes = maximum(of_lanes, value); }
    void add(Floats value, Tail i) { of_lanes = inside(i) ? maximum(of_lanes, value) : of_lanes; }
    float total() const { return largest_lane(of_lanes); }
};

struct Min {
    Floats of_lanes = lanes(INFINITY);
    void add(Floats value, Block) { of_lanes = minimum(of_lanes, value); }
    void add(Floats value, Tail i) { of_lanes = inside(i) ? minimum(of_lanes, value) : of_lanes; }
    float total() const { return -largest_lane(-of_lanes); }
};

// Memory of this thread for `count` values, aligned to a cache line. It grows and is kept; `purpose` tells uses apart.
template <class T>
inline T* scratch(int purpose, int64_t count) {
    static thread_local void* kept[8];
    static thread_local size_t capacity[8];
    size_t wanted = ((size_t)count * sizeof(T) + 63) / 64 * 64;
    if (wanted > capacity[purpose]) {
        free(kept[purpose]);
        kept[purpose] = aligned_alloc(64, wanted);
        if (!kept[purpose]) abort();
        capacity[purpose] = wanted;
    }
    return (T*)kept[purpose];
}

}  // namespace sage
