// Collectives among the ranks of one host, through memory that they share (communicator.cpp).
//
// A rank writes its part to its buffer, waits until all have done so, and reads the buffers of all. A tensor that is
// larger than a buffer takes several rounds. Sums are in the order of the ranks and in float32, so that all ranks get
// the same bits.
#pragma once

#include "kernel.h"
#include "sampling.h"

constexpr int64_t SAGE_MAX_RANKS = 64;

// One round: the number of ranks, this one's number, and the buffers of all.
struct SageRound {
    int64_t num_ranks, rank, buffer_bytes;
    char* buffers[SAGE_MAX_RANKS];
};

// Begins a round, and waits for the others in it. Without a communicator there is one rank, and no buffers.
extern "C" void sage_begin_round(SageRound* round);
extern "C" void sage_meet();

namespace sage {

// y = the sum of x over all ranks. y may be x.
template <class E>
inline void all_reduce_sum(const E* x, E* y, int64_t count) {
    SageRound round;
    for (int64_t begin = 0; begin < count;) {
        sage_begin_round(&round);
        if (round.num_ranks == 1) {
            if (x != y) memmove(y, x, count * sizeof(E));
            return;
        }
        const int64_t fits = round.buffer_bytes / (int64_t)sizeof(E);
        const int64_t size = count - begin < fits ? count - begin : fits;
        memcpy(round.buffers[round.rank], x + begin, size * sizeof(E));
        sage_meet();
        sweep(size, [&](auto i) {
            Floats sum = load((const E*)round.buffers[0], i);
            for (int64_t rank = 1; rank < round.num_ranks; ++rank) sum += load((const E*)round.buffers[rank], i);
            store(y + begin, i, to<E>(sum));
        });
        begin += size;
    }
}

// Calls body(row) for all rows, in parallel, when the row of y is the sum of the rows of x over all ranks. y may be x.
template <class E, class Body>
inline void all_reduce_rows(const E* x, int64_t x_stride, E* y, int64_t y_stride, int64_t rows, int64_t width,
                            Body&& body) {
    SageRound round;
    sage_begin_round(&round);
    const int64_t bytes = width * sizeof(E), fits = bytes > 0 ? round.buffer_bytes / bytes : rows;
    if (round.num_ranks == 1 || fits == 0) {  // a row that is larger than a buffer takes several rounds
        for (int64_t row = 0; row < rows; ++row) all_reduce_sum(x + row * x_stride, y + row * y_stride, width);
        return parallel_for_rows(rows, rows * width, body);
    }
    for (int64_t top = 0; top < rows; top += fits) {
        const int64_t height = minimum(fits, rows - top);
        sage_begin_round(&round);
        for (int64_t row = 0; row < height; ++row)
            memcpy(round.buffers[round.rank] + row * bytes, x + (top + row) * x_stride, bytes);
        sage_meet();
        parallel_for_rows(height, height * width * round.num_ranks, [&](int64_t row) {
            E* total = y + (top + row) * y_stride;
            sweep(width, [&](auto i) {
                Floats sum = load((const E*)(round.buffers[0] + row * bytes), i);
                for (int64_t rank = 1; rank < round.num_ranks; ++rank)
                    sum += load((const E*)(round.buffers[rank] + row * bytes), i);
                store(total, i, to<E>(sum));
            });
            body(top + row);
        });
    }
}

// y[row] = the rows of x of all ranks, one after another. A row that is larger than a buffer takes several rounds.
template <class E>
inline void all_gather_rows(const E* x, int64_t x_stride, E* y, int64_t y_stride, int64_t rows, int64_t width) {
    SageRound round;
    sage_begin_round(&round);
    if (round.num_ranks == 1) {
        for (int64_t row = 0; row < rows; ++row) memcpy(y + row * y_stride, x + row * x_stride, width * sizeof(E));
        return;
    }
    const int64_t fits = round.buffer_bytes / (int64_t)sizeof(E);
    const int64_t columns = minimum(width, fits), height = width > 0 ? maximum(fits / width, int64_t{1}) : rows;
    for (int64_t top = 0; top < rows; top += height)
        for (int64_t left = 0; left < width; left += columns) {
            const int64_t num_rows = minimum(height, rows - top), num_columns = minimum(columns, width - left);
            const int64_t bytes = num_columns * sizeof(E);
            sage_begin_round(&round);
            for (int64_t row = 0; row < num_rows; ++row)
                memcpy(round.buffers[round.rank] + row * bytes, x + (top + row) * x_stride + left, bytes);
            sage_meet();
            for (int64_t row = 0; row < num_rows; ++row)
                for (int64_t rank = 0; rank < round.num_ranks; ++rank)
                    memcpy(y + (top + row) * y_stride + rank * width + left, round.buffers[rank] + row * bytes, bytes);
        }
}

// The first token with the largest logit over all ranks, and the logit, for every row; NaN is larger than everything.
// The rank has `count` logits, of the tokens from `first` on, and ranks have ascending tokens.
inline void sample_of_ranks(const float* logits, int64_t stride, int64_t rows, int64_t count, int64_t first,
                            int64_t* tokens, float* best) {
    SageRound round;
    sage_begin_round(&round);
    const int64_t fits = round.num_ranks == 1 ? rows : round.buffer_bytes / (int64_t)sizeof(ArgMax);
    ArgMax* own = scratch<ArgMax>(Scratch::SAMPLE_LANES, minimum(rows, fits) + 1);
    for (int64_t top = 0; top < rows; top += fits) {
        const int64_t height = minimum(fits, rows - top);
        parallel_for_rows(height, height * count, [&](int64_t row) {
            own[row] = count > 0 ? argmax(logits + (top + row) * stride, count) : ArgMax{-INFINITY, 0};
            own[row].token += first;
        });
        if (round.num_ranks > 1) {
            sage_begin_round(&round);
            memcpy(round.buffers[round.rank], own, height * sizeof(ArgMax));
            sage_meet();
            for (int64_t row = 0; row < height; ++row) {
                own[row] = ((const ArgMax*)round.buffers[0])[row];
                for (int64_t rank = 1; rank < round.num_ranks; ++rank) {
                    const ArgMax other = ((const ArgMax*)round.buffers[rank])[row];
                    if (other.precedes(own[row])) own[row] = other;
                }
            }
        }
        for (int64_t row = 0; row < height; ++row) {
            tokens[top + row] = own[row].token;
            best[top + row] = own[row].logit;
        }
    }
}

}  // namespace sage
