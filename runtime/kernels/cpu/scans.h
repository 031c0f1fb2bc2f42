// Scans along a row: the reduction of the elements up to each one, in order. The tail of a row comes last, so that its
// inactive lanes do not matter.
//
// Sums and products of floats are kept in double and rounded for each element. NaN stays, as in torch.
#pragma once

#include "integers.h"

namespace sage {

inline double next_sum(double total, double value) { return total + value; }
inline double next_product(double total, double value) { return total * value; }
inline double next_max(double total, double value) { return total != total || total > value ? total : value; }
inline double next_min(double total, double value) { return total != total || total < value ? total : value; }

template <double (*NEXT)(double, double)>
struct FloatScan {
    double total;
    template <class Position>
    Floats add(Floats value, Position) {
        for (int lane = 0; lane < LANES; ++lane) value[lane] = (float)(total = NEXT(total, value[lane]));
        return value;
    }
};
struct CumSum : FloatScan<next_sum> {
    CumSum() : FloatScan{0.0} {}
};
struct CumProd : FloatScan<next_product> {
    CumProd() : FloatScan{1.0} {}
};
struct CumMax : FloatScan<next_max> {
    CumMax() : FloatScan{-INFINITY} {}
};
struct CumMin : FloatScan<next_min> {
    CumMin() : FloatScan{INFINITY} {}
};

// Integers wrap around: the value of a lane has the bits of a sum modulo 2^64.

template <class Lanes, int64_t START, int64_t (*NEXT)(int64_t, int64_t)>
struct IntegerScan {
    int64_t total = START;
    template <class Position>
    Lanes add(Lanes value, Position) {
        for (int lane = 0; lane < LANES; ++lane) value[lane] = total = NEXT(total, value[lane]);
        return value;
    }
};
inline int64_t next_largest(int64_t total, int64_t value) { return total > value ? total : value; }
inline int64_t next_smallest(int64_t total, int64_t value) { return total < value ? total : value; }

using IntCumSum = IntegerScan<Ints, 0, add>;
using IntCumProd = IntegerScan<Ints, 1, multiply>;
using IntCumMax = IntegerScan<Ints, INT64_MIN, next_largest>;
using IntCumMin = IntegerScan<Ints, INT64_MAX, next_smallest>;
using LongCumSum = IntegerScan<Longs, 0, add>;
using LongCumProd = IntegerScan<Longs, 1, multiply>;
using LongCumMax = IntegerScan<Longs, INT64_MIN, next_largest>;
using LongCumMin = IntegerScan<Longs, INT64_MAX, next_smallest>;

}  // namespace sage
