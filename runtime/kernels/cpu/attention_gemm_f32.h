// The two GEMMs of attention in float32: queries times 64 keys, and their weights times 64 values, for 16 query rows at
// a time.
//
// A class of GEMMs has the packed queries of a tile and the packed keys and values of one step, which all row blocks of
// the tile use. `multiply_keys` computes scores [BLOCK, KEYS]; `store_weights` replaces them by weights, and
// `add_values` reads those. Rows of keys and values are passed as pointers. The result of a row depends neither on the
// other rows nor on their number. attention_gemm_bf16.h has the same interface for processors that multiply bf16.
#pragma once

#include "isa.h"
#include "transpose.h"

namespace sage {

constexpr int KEYS = 64;      // of one step: four vectors of scores
constexpr int BLOCK = LANES;  // query rows that are computed together: one vector holds the maximum of each

template <class Element>
inline Floats load_padded(const Element* row, int64_t at, int64_t length) {
    return at + LANES <= length ? load(row, Block{at}) : load(row, Tail{at, length - at});
}

// The keys or values that the next step reads. They are prefetched line by line, a line for each that this step packs:
// a core has few buffers for lines that are on their way, and loses or delays the rest of many prefetches at once.
class RowPrefetch {
  public:
    RowPrefetch() : row_(nullptr), end_(nullptr), bytes_(0) {}
    template <class Stored>
    RowPrefetch(const Stored* const* row, int64_t width)
        : row_((const char* const*)row), end_(row_ + KEYS), bytes_(width * (int64_t)sizeof(Stored)) {}

    // LOCALITY as of __builtin_prefetch: 3 is the L1 cache, 2 the L2 cache.
    template <int LOCALITY = 3>
    void lines(int64_t count) {
        for (; count > 0 && row_ < end_; --count) {
            __builtin_prefetch(*row_ + at_, 0, LOCALITY);
            at_ += LINE;
            if (at_ >= bytes_) at_ = 0, ++row_;
        }
    }
    void rest() { lines(INT64_MAX); }

    int64_t row_bytes() const { return bytes_; }

    static constexpr int64_t LINE = 64;

  private:
    const char *const *row_, *const *end_;
    int64_t bytes_;
    int64_t at_ = 0;
};

// Multiplies each row by its factor. Most factors are 1, as the maximum of a row seldom grows after the first steps.
inline void rescale_rows(int64_t count, Floats factors, float* row, int64_t width) {
    for (int64_t r = 0; r < count; ++r, row += width)
        if (factors[r] != 1.0f)
            for (int64_t at = 0; at < width; at += LANES) store(row, Block{at}, load(row, Block{at}) * factors[r]);
}

// C[ROWS, 16 * VECTORS] (+)= A[ROWS, depth] B[depth, 16 * VECTORS]; every element is summed in the order of depth.
template <int ROWS, int VECTORS>
inline void multiply_block(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row,
                           int64_t depth, bool accumulate) {
    Floats sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = accumulate ? load(c + r * c_row + v * LANES, Block{0}) : Floats{};
    for (int64_t k = 0; k < depth; ++k) {
        Floats b_vectors[VECTORS];
        for (int v = 0; v < VECTORS; ++v) b_vectors[v] = load(b + k * b_row + v * LANES, Block{0});
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(broadcast(a[r * a_row + k]), b_vectors[v], sum[r][v]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(c + r * c_row + v * LANES, Block{0}, sum[r][v]);
}

template <int VECTORS>
inline void multiply_columns(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row,
                             int64_t rows, int64_t depth, bool accumulate) {
    int64_t r = 0;
    const auto block = [&](auto count) {
        for (; r + count <= rows; r += count)
            multiply_block<count, VECTORS>(a + r * a_row, a_row, b, b_row, c + r * c_row, c_row, depth, accumulate);
    };
    block(std::integral_constant<int, 4>{});
    block(std::integral_constant<int, 3>{});
    block(std::integral_constant<int, 1>{});
}

// `columns` must be a multiple of LANES.
inline void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row,
                     int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
    int64_t at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES)
        multiply_columns<4>(a, a_row, b + at, b_row, c + at, c_row, rows, depth, accumulate);
    for (; at < columns; at += LANES)
        multiply_columns<1>(a, a_row, b + at, b_row, c + at, c_row, rows, depth, accumulate);
}

template <class E>
class FloatGemms {
  public:
    FloatGemms(int64_t rows, int64_t key_width, int64_t value_width)
        : rows_(rows), key_width_(key_width), value_width_(value_width), depth_(round_up(key_width, LANES)),
          width_(round_up(value_width, LANES)) {
        const int64_t floats = rows_ * depth_ + depth_ * KEYS + KEYS * width_ + 3 * BLOCK * KEYS;
        queries_ = scratch<float>(Scratch::ATTENTION_FLOATS, floats);
        packed_keys_ = queries_ + rows_ * depth_;
        packed_values_ = packed_keys_ + depth_ * KEYS;
        scores_ = packed_values_ + KEYS * width_;
    }

    void pack_queries(const E* const* row) {
        for (int64_t r = 0; r < rows_; ++r)
            for (int64_t at = 0; at < depth_; at += LANES)
                store(queries_ + r * depth_, Block{at}, load_padded(row[r], at, key_width_));
    }

    // Packs the keys of a step as [depth, KEYS].
    void pack_keys(const E* const* row, RowPrefetch ahead) {
        for (int64_t key = 0; key < KEYS; key += LANES)
            for (int64_t at = 0; at < key_width_; at += LANES) {
                ahead.lines(LANES * LANES * (int64_t)sizeof(E) / RowPrefetch::LINE);
                Floats block[LANES];
                for (int lane = 0; lane < LANES; ++lane) block[lane] = load_padded(row[key + lane], at, key_width_);
                transpose(block);
                for (int d = 0; d < LANES; ++d) store(packed_keys_ + (at + d) * KEYS, Block{key}, block[d]);
            }
        ahead.rest();
    }

    void pack_values(const E* const* row, RowPrefetch ahead) {
        for (int64_t key = 0; key < KEYS; ++key) {
            ahead.lines(width_ * (int64_t)sizeof(E) / RowPrefetch::LINE + 1);
            for (int64_t at = 0; at < width_; at += LANES)
                store(packed_values_ + key * width_, Block{at}, load_padded(row[key], at, value_width_));
        }
    }

    // Three buffers, because three blocks are in the pipeline of TileWorker::attend_step.
    float* scores_of(int64_t block) const { return scores_ + block % 3 * BLOCK * KEYS; }

    void multiply_keys(int64_t block, int64_t first, int64_t count) {
        multiply(queries_ + first * depth_, depth_, packed_keys_, KEYS, scores_of(block), KEYS, count, KEYS, key_width_,
                 false);
    }

    // Stores the weights of keys `key` to `key` + 16, and of the 16 keys after them.
    void store_weights(int64_t block, int64_t i, int64_t key, Floats weight, Floats next) {
        store(scores_of(block) + i * KEYS, Block{key}, weight);
        store(scores_of(block) + i * KEYS, Block{key + LANES}, next);
    }

    // sums[count, width] = rescale * sums + weights * values
    void add_values(int64_t block, int64_t count, Floats rescale, float* sums) {
        rescale_rows(count, rescale, sums, width_);
        multiply(scores_of(block), KEYS, packed_values_, width_, sums, width_, count, width_, KEYS, true);
    }

  private:
    int64_t rows_, key_width_, value_width_, depth_, width_;
    float *queries_, *packed_keys_, *packed_values_, *scores_;
};

}  // namespace sage
