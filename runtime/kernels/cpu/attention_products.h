// The two products of a tile of attention: queries by 64 keys, and their weights by 64 values.
//
// TileProducts<E> holds a tile's queries, and `scores`, [rows, KEYS], which `multiply_keys` fills. `add_values` takes the
// weights from there. Rows of keys and values are told by pointers; null is a row of zeros. What a row gets depends
// neither on the other rows nor on their number. In float32, except bf16 where the processor multiplies that (see below).
#pragma once

#include "ways.h"

namespace sage {

constexpr int KEYS = 64;  // keys of one step: four vectors of scores

inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class Element>
inline Floats load_some(const Element* row, int64_t at, int64_t length) {
    return at + LANES <= length ? load(row, Block{at}) : load(row, Tail{at, length - at});
}

template <class Element>
inline void fetch_rows(const Element* const* row, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t at = 0; at < width; at += 64 / (int64_t)sizeof(Element)) __builtin_prefetch(row[r] + at);
}

// C[rows, 16 * VECTORS] = A[rows, depth] B[depth, 16 * VECTORS], added to C or not; every row in the order of depth.
template <int ROWS, int VECTORS>
inline void multiply_block(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, bool adds) {
    Floats sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = adds ? load(c + r * c_row + v * LANES, Block{0}) : Floats{};
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
inline void multiply_columns(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t depth,
    bool adds) {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6)
        multiply_block<6, VECTORS>(a + r * a_row, a_row, b, b_row, c + r * c_row, c_row, depth, adds);
    for (; r + 2 <= rows; r += 2)
        multiply_block<2, VECTORS>(a + r * a_row, a_row, b, b_row, c + r * c_row, c_row, depth, adds);
    for (; r < rows; ++r)
        multiply_block<1, VECTORS>(a + r * a_row, a_row, b, b_row, c + r * c_row, c_row, depth, adds);
}

// Columns are padded to whole vectors.
inline void multiply(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
    int64_t depth, bool adds) {
    int64_t at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES)
        multiply_columns<4>(a, a_row, b + at, b_row, c + at, c_row, rows, depth, adds);
    for (; at < columns; at += LANES)
        multiply_columns<1>(a, a_row, b + at, b_row, c + at, c_row, rows, depth, adds);
}

// 16 x 16 floats with rows and columns swapped, by four rounds that each swap halves of pairs of rows.
template <int WIDTH>
inline void swap_halves(Floats* row) {
    const Ints is_upper = (LANE_NUMBERS & WIDTH) != 0, other = LANE_NUMBERS ^ WIDTH;
    const Ints low = is_upper ? other + LANES : LANE_NUMBERS, high = is_upper ? LANE_NUMBERS + LANES : other;
    for (int i = 0; i < LANES; ++i) {
        if (i & WIDTH) continue;
#if defined(__AVX512F__)
        Floats a = (Floats)_mm512_permutex2var_ps((__m512)row[i], (__m512i)low, (__m512)row[i + WIDTH]);
        Floats b = (Floats)_mm512_permutex2var_ps((__m512)row[i], (__m512i)high, (__m512)row[i + WIDTH]);
#else
        Floats a, b;
        for (int lane = 0; lane < LANES; ++lane) {
            a[lane] = low[lane] < LANES ? row[i][low[lane]] : row[i + WIDTH][low[lane] - LANES];
            b[lane] = high[lane] < LANES ? row[i][high[lane]] : row[i + WIDTH][high[lane] - LANES];
        }
#endif
        row[i] = a;
        row[i + WIDTH] = b;
    }
}
inline void transpose(Floats* row) {
    swap_halves<8>(row);
    swap_halves<4>(row);
    swap_halves<2>(row);
    swap_halves<1>(row);
}

template <class E>
class TileProducts {
   public:
    float* scores;

    TileProducts(int64_t rows, int64_t key_width, int64_t value_width)
        : rows(rows), key_width(key_width), value_width(value_width), depth(rounded_up(key_width, LANES)),
          width(rounded_up(value_width, LANES)) {
        queries = scratch<float>(0, rows * depth + depth * KEYS + KEYS * width + rows * KEYS);
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
    void multiply_keys(const E* const* row) {
        for (int64_t key = 0; key < KEYS; key += LANES)
            for (int64_t at = 0; at < key_width; at += LANES) {
                Floats block[LANES];
                for (int lane = 0; lane < LANES; ++lane)
                    block[lane] = row[key + lane] ? load_some(row[key + lane], at, key_width) : Floats{};
                transpose(block);
                for (int d = 0; d < LANES; ++d) store(packed_keys + (at + d) * KEYS, Block{key}, block[d]);
            }
        multiply(queries, depth, packed_keys, KEYS, scores, KEYS, rows, KEYS, key_width, false);
    }

    void put_weight(int64_t r, int64_t key, Floats weight) { store(scores + r * KEYS, Block{key}, weight); }

    void add_values(const E* const* row, float* sums) {
        for (int64_t key = 0; key < KEYS; ++key)
            for (int64_t at = 0; at < width; at += LANES)
                store(packed_values + key * width, Block{at}, row[key] ? load_some(row[key], at, value_width) : Floats{});
        multiply(scores, KEYS, packed_values, width, sums, width, rows, width, KEYS, true);
    }

   private:
    int64_t rows, key_width, value_width, depth, width;
    float *queries, *packed_keys, *packed_values;
};

#if defined(__AVX512BF16__)

// bf16 by the machine's way of multiplying packed weights (ways.h): keys and values are packed as weights are. A weight of
// attention is split into two bf16, so that its 16 bits of mantissa cost next to nothing in accuracy.
template <>
class TileProducts<bf16> {
   public:
    float* scores;

    TileProducts(int64_t rows, int64_t key_width, int64_t value_width)
        : way(sage::way<bf16, 6, 4, 4, 2>()), rows(rows), key_width(key_width), value_width(value_width),
          depth(rounded_up(key_width, DEPTH)), panels(rounded_up(value_width, PANEL) / PANEL) {
        const int64_t whole = rounded_up(rows, 16);
        scores = scratch<float>(0, whole * KEYS + MAX_SUMS);
        sums_of_block = scores + whole * KEYS;
        queries = scratch<bf16>(0, whole * depth * 2 + whole * 2 * SPLIT + KEYS * depth + SPLIT * panels * PANEL);
        prepared = queries + whole * depth * 2;
        weights = prepared + whole * SPLIT;
        packed_keys = weights + whole * SPLIT;
        packed_values = packed_keys + KEYS * depth;
        way.begin();
    }
    ~TileProducts() { way.end(); }
    TileProducts(const TileProducts&) = delete;

    void take_queries(const bf16* const* row) { way.prepare(queries, row, rows, key_width); }

    // Pairs along the width, which are words here: panels of 16 keys
    void multiply_keys(const bf16* const* row) {
        for (int64_t key = 0; key < KEYS; key += PANEL)
            for (int64_t at = 0; at < depth; at += 2 * LANES) {
                Floats words[LANES];
                for (int lane = 0; lane < LANES; ++lane) words[lane] = load_words(row[key + lane], at);
                transpose(words);
                memcpy((void*)(packed_keys + key * depth + at * PANEL), words, sizeof words);
            }
        multiply(queries, depth, packed_keys, KEYS / PANEL, [&](int64_t r, int64_t column, Floats sum) {
            store(scores + r * KEYS, Block{column}, sum);
        });
    }

    void put_weight(int64_t r, int64_t key, Floats weight) {
        const Floats upper = nearest(weight);
        store(weights + r * SPLIT, Block{key}, upper);
        store(weights + r * SPLIT + KEYS, Block{key}, nearest(weight - upper));
    }

    // Pairs of keys, twice: for the upper and for the lower halves of the weights
    void add_values(const bf16* const* row, float* sums) {
        for (int64_t key = 0; key < KEYS; key += 2)
            for (int64_t p = 0; p < panels; ++p) {
                Bits pairs = load_bits(row[key], p * PANEL) | load_bits(row[key + 1], p * PANEL) << 16;
                bf16* place = packed_values + p * PANEL * SPLIT + key * PANEL;
                memcpy((void*)place, &pairs, sizeof pairs);
                memcpy((void*)(place + KEYS * PANEL), &pairs, sizeof pairs);
            }
        const bf16** weight = scratch<const bf16*>(1, rows);
        for (int64_t r = 0; r < rows; ++r) weight[r] = weights + r * SPLIT;
        way.prepare(prepared, weight, rows, SPLIT);
        const int64_t width = panels * PANEL;
        multiply(prepared, SPLIT, packed_values, panels, [&](int64_t r, int64_t column, Floats sum) {
            store(sums + r * width, Block{column}, load(sums + r * width, Block{column}) + sum);
        });
    }

   private:
    static constexpr int64_t SPLIT = 2 * KEYS;
    const Way<bf16>& way;
    int64_t rows, key_width, value_width, depth, panels;
    float* sums_of_block;
    bf16 *queries, *prepared, *weights, *packed_keys, *packed_values;

    Floats load_words(const bf16* row, int64_t at) const {
        alignas(64) bf16 words[2 * LANES] = {};
        if (!row) return Floats{};
        int64_t left = key_width - at;
        if (left >= 2 * LANES) return bits_of<Floats>(_mm512_loadu_si512(row + at));
        if (left > 0) memcpy((void*)words, row + at, left * sizeof(bf16));
        return bits_of<Floats>(_mm512_load_si512(words));
    }

    Bits load_bits(const bf16* row, int64_t at) const {
        Halves bits = {};
        if (!row) return Bits{};
        int64_t left = value_width - at;
        memcpy(&bits, row + at, (left < PANEL ? left : PANEL) * sizeof(bf16));
        return spread(bits);
    }

    // to<bf16> in one instruction, which takes subnormals for 0
    static Floats nearest(Floats value) { return widened((Halves)_mm512_cvtneps_pbh((__m512)value), bf16{}); }

    template <class Take>
    void multiply(const bf16* x, int64_t inner, const bf16* w, int64_t count, Take&& take) {
        for (int64_t p = 0; p < count; p += way.few_panels) {
            const int64_t some = count - p < way.few_panels ? count - p : way.few_panels;
            for (int64_t first = 0; first < rows; first += way.few_rows) {
                const int64_t left = rows - first < way.few_rows ? rows - first : way.few_rows;
                way.block(sums_of_block, x, first, left, inner, w + p * PANEL * inner, some, Ahead{nullptr, 0});
                for (int64_t r = 0; r < left; ++r)
                    for (int64_t column = 0; column < some * PANEL; column += PANEL)
                        take(first + r, p * PANEL + column, load(sums_of_block + r * some * PANEL, Block{column}));
            }
        }
    }
};

#endif

}  // namespace sage
