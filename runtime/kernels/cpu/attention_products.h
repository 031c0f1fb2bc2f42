// The two products of attention: queries by 64 keys, and their weights by 64 values, for 16 query rows at a time.
//
// A class of products holds a tile's queries and one step's keys and values, packed; all blocks of the tile's rows use
// them. `multiply_keys` gives scores, [BLOCK, KEYS], `add_values` takes the weights that were put in their place. Rows of
// keys and values are told by pointers. What a row gets depends neither on the other rows nor on their number.
//
// Here in float32; attention_pairs.h has bf16 where the processor multiplies that.
#pragma once

#include "transpose.h"
#include "ways.h"

namespace sage {

constexpr int KEYS = 64;      // of one step: four vectors of scores
constexpr int BLOCK = LANES;  // query rows that are computed together

template <class Element>
inline Floats load_some(const Element* row, int64_t at, int64_t length) {
    return at + LANES <= length ? load(row, Block{at}) : load(row, Tail{at, length - at});
}

// Rows times a factor each; most are 1.
inline void fade_rows(int64_t count, Floats fade, float* row, int64_t width) {
    for (int64_t r = 0; r < count; ++r, row += width)
        if (fade[r] != 1.0f)
            for (int64_t at = 0; at < width; at += LANES) store(row, Block{at}, load(row, Block{at}) * fade[r]);
}

// C[ROWS, 16 * VECTORS] = A[ROWS, depth] B[depth, 16 * VECTORS], added to C or not; every row in the order of depth.
template <int ROWS, int VECTORS>
inline void multiply_block(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row,
                           int64_t depth, bool adds) {
    Floats sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
            sum[r][v] = adds ? load(c + r * c_row + v * LANES, Block{0}) : Floats{};
    for (int64_t k = 0; k < depth; ++k) {
        Floats of_b[VECTORS];
        for (int v = 0; v < VECTORS; ++v) of_b[v] = load(b + k * b_row + v * LANES, Block{0});
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(lanes(a[r * a_row + k]), of_b[v], sum[r][v]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(c + r * c_row + v * LANES, Block{0}, sum[r][v]);
}

template <int VECTORS>
inline void multiply_columns(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row,
                             int64_t rows, int64_t depth, bool adds) {
    int64_t r = 0;
    const auto block = [&](auto several) {
        for (; r + several <= rows; r += several)
            multiply_block<several, VECTORS>(a + r * a_row, a_row, b, b_row, c + r * c_row, c_row, depth, adds);
    };
    block(std::integral_constant<int, 4>{});
    block(std::integral_constant<int, 3>{});
    block(std::integral_constant<int, 1>{});
}

// Columns are padded to whole vectors.
inline void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                     int64_t columns, int64_t depth, bool adds) {
    int64_t at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES)
        multiply_columns<4>(a, a_row, b + at, b_row, c + at, c_row, rows, depth, adds);
    for (; at < columns; at += LANES)
        multiply_columns<1>(a, a_row, b + at, b_row, c + at, c_row, rows, depth, adds);
}

template <class E>
class FloatProducts {
   public:
    FloatProducts(int64_t rows, int64_t key_width, int64_t value_width)
        : rows(rows), key_width(key_width), value_width(value_width), depth(round_up(key_width, LANES)),
          width(round_up(value_width, LANES)) {
        queries = scratch<float>(0, rows * depth + depth * KEYS + KEYS * width + 3 * BLOCK * KEYS);
        packed_keys = queries + rows * depth;
        packed_values = packed_keys + depth * KEYS;
        scores = packed_values + KEYS * width;
    }

    void take_queries(const E* const* row) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t at = 0; at < depth; at += LANES)
                store(queries + r * depth, Block{at}, load_some(row[r], at, key_width));
    }

    // Packed as [depth, KEYS]
    void take_keys(const E* const* row) {
        for (int64_t key = 0; key < KEYS; key += LANES)
            for (int64_t at = 0; at < key_width; at += LANES) {
                Floats block[LANES];
                for (int lane = 0; lane < LANES; ++lane)
                    block[lane] = load_some(row[key + lane], at, key_width);
                transpose(block);
                for (int d = 0; d < LANES; ++d) store(packed_keys + (at + d) * KEYS, Block{key}, block[d]);
            }
    }

    void take_values(const E* const* row) {
        for (int64_t key = 0; key < KEYS; ++key)
            for (int64_t at = 0; at < width; at += LANES)
                store(packed_values + key * width, Block{at}, load_some(row[key], at, value_width));
    }

    float* scores_of(int64_t block) const { return scores + block % 3 * BLOCK * KEYS; }

    void multiply_keys(int64_t block, int64_t first, int64_t count) {
        multiply(queries + first * depth, depth, packed_keys, KEYS, scores_of(block), KEYS, count, KEYS, key_width, false);
    }

    // The weights of keys `key` to `key` + 16, and of the 16 behind them
    void put_weights(int64_t block, int64_t i, int64_t key, Floats weight, Floats next) {
        store(scores_of(block) + i * KEYS, Block{key}, weight);
        store(scores_of(block) + i * KEYS, Block{key + LANES}, next);
    }

    // What the fades leave of sums[count, width], and the weights times the values
    void add_values(int64_t block, int64_t count, Floats fade, float* sums) {
        fade_rows(count, fade, sums, width);
        multiply(scores_of(block), KEYS, packed_values, width, sums, width, count, width, KEYS, true);
    }

   private:
    int64_t rows, key_width, value_width, depth, width;
    float *queries, *packed_keys, *packed_values, *scores;
};

}  // namespace sage
