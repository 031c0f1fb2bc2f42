// Scratch memory of a thread, kept between calls: a decode step has hundreds of calls, too many for an allocator.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "error.h"

namespace sage {

// Uses that are alive at the same time on one thread must have different slots.
enum class Scratch {
    GEMM_ROWS,            // pointers to the rows of x
    PREPARED_ROWS,        // the same rows, prepared
    COMPUTED_ROWS,        // rows of x that the prologue of a GEMM computes
    ATTENTION_TILES,      // the tiles of a call
    ATTENTION_STATES,     // softmax states of a tile
    PART_STATES,          // softmax states of all parts of all tiles
    QUERY_ROWS,           // pointers to the query rows of a tile
    ROW_BLOCKS,           // blocks of rows of a tile
    ZERO_ROW,             // a row of zeros, for invisible keys
    OPENED_KEYS,          // codes of the keys of a step as elements
    OPENED_VALUES,        // the same of its values
    ATTENTION_FLOATS,     // operands and scores of attention's GEMMs
    ATTENTION_PAIRS,      // their operands in bf16
    ROUTE_STARTS,         // the first row of each expert
    ROUTE_ORDER,          // rows ordered by expert
    EXPERT_SCORES,        // scores and biased scores of one token
    EXPERT_GROUP_SCORES,  // scores of the groups
    EXPERTS_TAKEN,        // flags
    SAMPLE_LANES,         // argmax by lane, part and row
    PROBABILITIES,        // of one row of logits
    TOKEN_ORDER,          // tokens ordered by probability
    TOP_CANDIDATES,       // of up to 4 selections of a row
    TOP_VALUES = TOP_CANDIDATES + 4,
    TOP_INDICES = TOP_VALUES + 4,
    KV_ROWS = TOP_INDICES + 4,  // up to 2 rows of a cache before they are encoded
    COUNT = KV_ROWS + 2
};

inline void* scratch_bytes(Scratch slot, size_t size) {
    static thread_local void* memory[(int)Scratch::COUNT];
    static thread_local size_t capacity[(int)Scratch::COUNT];
    const int i = (int)slot;
    if (size > capacity[i]) {
        free(memory[i]);
        capacity[i] = 0;
        memory[i] = aligned_alloc(64, size);
        if (!memory[i]) throw Error{"cannot allocate %lld bytes of scratch memory", (long long)size};
        capacity[i] = size;
    }
    return memory[i];
}

// Memory for `count` values, aligned to a cache line. Its contents are those of the last use. Throws Error.
template <class T>
inline T* scratch(Scratch slot, int64_t count) {
    return (T*)scratch_bytes(slot, ((size_t)count * sizeof(T) + 63) / 64 * 64);
}

}  // namespace sage
