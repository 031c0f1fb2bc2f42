// Loops over rows and along them, and reductions.
#pragma once

#include "functions.h"
#include "integers.h"
#include "scratch.h"
#include "thread_pool.h"

namespace sage {

constexpr int64_t PARALLEL_WORK = 32 * 1024;  // elements below which waking a second thread costs more than it saves

struct Range {
    int64_t first, last;
    int64_t count() const { return last - first; }
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Part `i` of `parts` of the range 0 to `count`, cut at multiples of `step`.
inline Range split_range(int64_t count, int64_t step, int64_t i, int64_t parts) {
    const int64_t steps = (count + step - 1) / step;
    return {minimum(count, steps * i / parts * step), minimum(count, steps * (i + 1) / parts * step)};
}

// Calls body(row) for all rows, in parallel. A row is computed by one thread in one order, so that results do not
// depend on the number of threads. A body that captures by value keeps its sizes and addresses in registers: a thread
// calls a local copy, which no store can change.
template <class Body>
inline void parallel_for_rows(int64_t rows, int64_t elements, Body&& body) {
    const int64_t parts = num_parts(rows, elements / (PARALLEL_WORK / 2));
    parallel_for(parts, [&](int64_t part) {
        const Range range = split_range(rows, 1, part, parts);
        const auto on_row = body;
        for (int64_t row = range.first; row < range.last; ++row) on_row(row);
    });
}

// The same in two steps: value = reduce(row), then finish(row, value). The next row is reduced first, so that the
// additions of its reduction, each of which waits for the one before, leave no unit of the processor idle. Each step
// has one call, which is inlined.
template <class Reduce, class Finish>
inline void parallel_for_reduced_rows(int64_t rows, int64_t elements, Reduce&& reduce, Finish&& finish) {
    const int64_t parts = num_parts(rows, elements / (PARALLEL_WORK / 2));
    parallel_for(parts, [&](int64_t part) {
        const Range range = split_range(rows, 1, part, parts);
        const auto on_row = reduce;
        const auto on_reduced_row = finish;
        float value = 0.0f;
        for (int64_t row = range.first; row <= range.last; ++row) {
            const float next = row < range.last ? on_row(row) : 0.0f;
            if (row > range.first) on_reduced_row(row - 1, value);
            value = next;
        }
    });
}

// One pass along a row: calls the body with all full blocks, then with the tail if there is one.
template <class Body>
inline void sweep(int64_t length, Body&& body) {
    int64_t at = 0;
    for (; at + LANES <= length; at += LANES) body(Block{at});
    if (at < length) body(Tail{at, length - at});
}

// Reductions of the lanes of one vector, as a tree. Both sides of an exchange compute the same sum, so every lane has
// it.

inline Floats swap_lanes(Floats value, int distance) {
#if defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)(LANE_NUMBERS ^ distance), (__m512)value);
#else
    Floats result;
    for (int lane = 0; lane < LANES; ++lane) result[lane] = value[lane ^ distance];
    return result;
#endif
}
inline float reduce_sum(Floats value) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) value += swap_lanes(value, distance);
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
inline float reduce_max(Floats value) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) value = maximum(value, swap_lanes(value, distance));
    return value[0];
}

// Reductions along a row: lane by lane, then over the lanes as a tree. Floating-point addition is not associative, so
// the order is fixed by the row's length alone: a request's result must not change with its batch or the number of
// threads.

struct Sum {
    Floats by_lane = {};
    void add(Floats value, Block) { by_lane += value; }
    void add(Floats value, Tail i) { by_lane += active_lanes(i) ? value : Floats{}; }
    template <class Position>
    void add(float value, Position i) {
        add(broadcast(value), i);
    }
    float total() const { return reduce_sum(by_lane); }
};

struct Max {
    Floats by_lane = broadcast(-INFINITY);
    void add(Floats value, Block) { by_lane = maximum(by_lane, value); }
    void add(Floats value, Tail i) { by_lane = active_lanes(i) ? maximum(by_lane, value) : by_lane; }
    float total() const { return reduce_max(by_lane); }
};

struct Min {
    Floats by_lane = broadcast(INFINITY);
    void add(Floats value, Block) { by_lane = minimum(by_lane, value); }
    void add(Floats value, Tail i) { by_lane = active_lanes(i) ? minimum(by_lane, value) : by_lane; }
    float total() const { return -reduce_max(-by_lane); }
};

// The same for Ints and Longs. Integer sums are exact modulo the size of a lane, so that their order does not matter.

template <class Lanes, int64_t START, Lanes (*JOIN)(Lanes, Lanes)>
struct IntegerReduction {
    Lanes by_lane = Lanes{} + (decltype(Lanes{}[0] + 0))START;
    void add(Lanes value, Block) { by_lane = JOIN(by_lane, value); }
    void add(Lanes value, Tail i) { by_lane = where(active_lanes(i), JOIN(by_lane, value), by_lane); }
    int64_t total() const {
        Lanes result = by_lane;
        for (int lane = 1; lane < LANES; ++lane) {
            Lanes other = Lanes{} + by_lane[lane];
            result = JOIN(result, other);
        }
        return result[0];
    }
};
using IntSum = IntegerReduction<Ints, 0, add>;
using IntMax = IntegerReduction<Ints, INT32_MIN, maximum>;
using IntMin = IntegerReduction<Ints, INT32_MAX, minimum>;
using LongSum = IntegerReduction<Longs, 0, add>;
using LongMax = IntegerReduction<Longs, INT64_MIN, maximum>;
using LongMin = IntegerReduction<Longs, INT64_MAX, minimum>;

}  // namespace sage
