// Where the keys, values and query rows of attention lie.
#pragma once

#include "loops.h"

namespace sage {

// In a paged cache: a sequence's query rows are its last positions.
template <class E>
struct PagedKeys {
    const E* k;
    int64_t k_page, k_slot, k_head;
    const E* v;
    int64_t v_page, v_slot, v_head;
    const int32_t* block_table;
    int64_t table_row, block_size;
    const int32_t* seq_lens;
    const int32_t* q_start;  // null where every sequence has one row

    int64_t length(int64_t b) const { return seq_lens[b]; }
    int64_t queries(int64_t b) const { return q_start ? q_start[b + 1] - q_start[b] : 1; }
    int64_t row(int64_t b, int64_t i) const { return q_start ? q_start[b] + i : b; }
    int64_t position(int64_t b, int64_t i) const { return length(b) - queries(b) + i; }
    void find_keys(int64_t b, int64_t g, int64_t first, int64_t stop, const E** rows) const {
        find(k + g * k_head, k_page, k_slot, b, first, stop, rows);
    }
    void find_values(int64_t b, int64_t g, int64_t first, int64_t stop, const E** rows) const {
        find(v + g * v_head, v_page, v_slot, b, first, stop, rows);
    }
    void find(
        const E* cache, int64_t page, int64_t slot, int64_t b, int64_t first, int64_t stop, const E** rows) const {
        const int32_t* blocks = block_table + b * table_row;
        for (int64_t n = first; n < stop;) {
            int64_t offset = n % block_size, rest = block_size - offset;
            const E* row = cache + blocks[n / block_size] * page + offset * slot;
            for (int64_t run = stop - n < rest ? stop - n : rest; run > 0; --run, ++n, row += slot) *rows++ = row;
        }
    }
};

// Side by side: the keys of a sequence are the rows of its queries.
template <class E>
struct OwnKeys {
    const E* k;
    int64_t k_row, k_head;
    const E* v;
    int64_t v_row, v_head;
    const int32_t* q_start;

    int64_t length(int64_t b) const { return q_start[b + 1] - q_start[b]; }
    int64_t queries(int64_t b) const { return length(b); }
    int64_t row(int64_t b, int64_t i) const { return q_start[b] + i; }
    int64_t position(int64_t, int64_t i) const { return i; }
    void find_keys(int64_t b, int64_t g, int64_t first, int64_t stop, const E** rows) const {
        for (int64_t n = first; n < stop; ++n) *rows++ = k + row(b, n) * k_row + g * k_head;
    }
    void find_values(int64_t b, int64_t g, int64_t first, int64_t stop, const E** rows) const {
        for (int64_t n = first; n < stop; ++n) *rows++ = v + row(b, n) * v_row + g * v_head;
    }
};

}  // namespace sage
