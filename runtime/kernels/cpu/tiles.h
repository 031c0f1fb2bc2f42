// Ways to multiply a block: by which instructions, in which sizes. One is chosen per machine and serves every batch.
//
// Each element of a result is one chain of sums along K, in the order of K. The chain is the same whatever the block,
// the batch and the number of threads, so a row's result depends on nothing but the row.
#pragma once

#include "packed.h"

namespace sage {

constexpr int64_t MAX_SUMS = 32 * 2 * PANEL;  // of a block, over all ways

// Weights to fetch while a block is computed: per DEPTH elements of K so many cache lines of each of some streams, which
// lie `apart` bytes from each other. A core reads several streams faster than one. `is_near`: this block reads them.
struct Ahead {
    const char* from;
    int64_t lines, streams, apart;
    bool is_near;
};

inline void fetch(Ahead& ahead) {
    for (int64_t s = 0; s < ahead.streams; ++s)
        for (int64_t i = 0; i < ahead.lines; ++i) {
            const char* line = ahead.from + s * ahead.apart + i * 64;
            if (ahead.is_near)
                __builtin_prefetch(line, 0, 3);
            else
                __builtin_prefetch(line, 0, 2);
        }
    ahead.from += ahead.lines * 64;
}

template <class Element>
struct Way {
    int64_t rows, panels;          // of a block, at most
    int64_t few_rows, few_panels;  // a product of so few rows has blocks of so many panels
    int64_t row_step;              // prepared x has a multiple of this many rows
    int64_t value_size;            // bytes per element of prepared x
    void (*begin)();               // called by each thread before its first block
    void (*end)();                 // and after its last
    void (*prepare)(void* prepared, const Element* const* x, int64_t rows, int64_t K);
    // sums[rows][panels][PANEL] of the prepared rows from `first` on, and of the panels from w on
    void (*block)(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, const Element* w,
                  int64_t panels, Ahead ahead);
};

inline void nothing() {}

}  // namespace sage
