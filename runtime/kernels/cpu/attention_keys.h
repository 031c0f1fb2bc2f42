// Memory layouts of the keys, values and query rows of attention: paged or contiguous, elements or codes.
#pragma once

#include "kv_forms.h"

namespace sage {

// Keys first <= n < stop: those of a sequence that a mask leaves visible.
struct KeyRange {
    int64_t first;
    int64_t stop;

    bool overlaps(KeyRange other) const { return first < other.stop && other.first < stop; }
    bool contains(KeyRange other) const { return first <= other.first && other.stop <= stop; }
};

// A paged cache: the query rows of a sequence are its last positions.
template <class Row>
struct PagedKeys {
    using Stored = Row;

    const Row* k;
    int64_t k_page, k_slot, k_head;
    const Row* v;
    int64_t v_page, v_slot, v_head;
    const int32_t* block_table;
    int64_t table_row, block_size;
    const int32_t* seq_lens;
    const int32_t* q_start;  // null if every sequence has one row

    int64_t length(int64_t b) const { return seq_lens[b]; }
    int64_t queries(int64_t b) const { return q_start ? q_start[b + 1] - q_start[b] : 1; }
    int64_t row(int64_t b, int64_t i) const { return q_start ? q_start[b] + i : b; }
    int64_t position(int64_t b, int64_t i) const { return length(b) - queries(b) + i; }
    void find(int64_t b, int64_t g, int64_t first, int64_t stop, const Row** key, const Row** value) const {
        const int32_t* blocks = block_table + b * table_row;
        for (int64_t n = first; n < stop;) {
            const int64_t page = blocks[n / block_size], offset = n % block_size;
            const int64_t end = minimum(stop, n - offset + block_size);
            const Row* k_row = k + g * k_head + page * k_page + offset * k_slot;
            const Row* v_row = v + g * v_head + page * v_page + offset * v_slot;
            for (; n < end; ++n, k_row += k_slot, v_row += v_slot) *key++ = k_row, *value++ = v_row;
        }
    }
};

// Contiguous keys: those of a sequence are the rows of its queries.
template <class E>
struct ContiguousKeys {
    using Stored = E;

    const E* k;
    int64_t k_row, k_head;
    const E* v;
    int64_t v_row, v_head;
    const int32_t* q_start;

    int64_t length(int64_t b) const { return q_start[b + 1] - q_start[b]; }
    int64_t queries(int64_t b) const { return length(b); }
    int64_t row(int64_t b, int64_t i) const { return q_start[b] + i; }
    int64_t position(int64_t, int64_t i) const { return i; }
    void find(int64_t b, int64_t g, int64_t first, int64_t stop, const E** key, const E** value) const {
        for (int64_t n = first; n < stop; ++n) {
            *key++ = k + row(b, n) * k_row + g * k_head;
            *value++ = v + row(b, n) * v_row + g * v_head;
        }
    }
};

}  // namespace sage
