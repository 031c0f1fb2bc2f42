// The two products of attention in bf16, by the machine's way of multiplying packed weights (ways.h), AMX or AVX512_BF16.
//
// Keys and values are packed as weights are. A weight of attention is split into two bf16, so that its 16 bits of mantissa
// cost next to nothing in accuracy; the lower halves are rows of their own. Of few rows, AMX multiplies the keys by the
// queries instead: then only the queries are packed, and the sums are the same.
#pragma once

#include "attention_products.h"

#if defined(__AVX512BF16__)
namespace sage {

const __m512i FIRST_LANES = {0, 1, 8, 9, 2, 3, 10, 11}, LAST_LANES = {4, 5, 12, 13, 6, 7, 14, 15};

// The number that bf16 rounds a weight to, as the bits of a float32
inline Bits upper_half(Floats weight) { return (bits_of<Bits>(weight) + 0x8000) & 0xffff0000; }

// Up to 32 elements of a row from `at` on; zeros beyond its end, and of no row.
inline __m512i load_pairs(const bf16* row, int64_t at, int64_t length) {
    const int64_t left = row ? length - at : 0;
    return left >= DEPTH ? _mm512_loadu_si512(row + at)
                         : _mm512_maskz_loadu_epi16(left > 0 ? (1u << left) - 1 : 0, row + at);
}

template <>
class TileProducts<bf16> {
   public:
    float* scores;

    TileProducts(int64_t rows, int64_t key_width, int64_t value_width)
        : way(sage::way<bf16, 6, 4, 4, 2>()), rows(rows), key_width(key_width), value_width(value_width),
          depth(round_up(key_width, DEPTH)), panels(round_up(value_width, DEPTH) / PANEL),
          lower_rows(rows <= BLOCK / 2 ? BLOCK / 2 : BLOCK), turns_keys(way.row_step == BLOCK && rows <= BLOCK) {
        const int64_t whole = round_up(rows, BLOCK);
        scores = scratch<float>(0, BLOCK * KEYS + KEYS * PANEL + 2 * BLOCK * 4 * PANEL);
        sums_of_block = scores + BLOCK * KEYS;
        queries = scratch<bf16>(0, (whole + KEYS) * depth + 2 * BLOCK * KEYS + KEYS * panels * PANEL);
        packed_keys = queries + whole * depth;
        weights = packed_keys + KEYS * depth;
        packed_values = weights + 2 * BLOCK * KEYS;
        way.begin();
    }
    ~TileProducts() { way.end(); }
    TileProducts(const TileProducts&) = delete;

    void take_queries(const bf16* const* row) {
        if (!turns_keys) return way.prepare(queries, row, rows, key_width);
        const bf16* padded[BLOCK] = {};
        memcpy(padded, row, rows * sizeof(bf16*));
        pack_panel(queries, padded);
    }

    void take_keys(const bf16* const* row) {
        for (int64_t key = 0; key < KEYS; key += PANEL)
            if (!turns_keys)
                pack_panel(packed_keys + key * depth, row + key);
            else
                for (int64_t k = key; k < key + PANEL; ++k)
                    for (int64_t at = 0; at < depth; at += DEPTH)
                        _mm512_store_si512(prepared(packed_keys, k, at, depth), load_pairs(row[k], at, key_width));
    }

    // Pairs are of keys 16 apart, as the weights' are
    void take_values(const bf16* const* row) {
        for (int64_t k = 0; k < KEYS; k = k % DEPTH == PANEL - 1 ? k + 1 + PANEL : k + 1)
            for (int64_t p = 0; p < panels; p += 2) {
                const __m512i a = load_pairs(row[k], p * PANEL, value_width);
                const __m512i b = load_pairs(row[k + PANEL], p * PANEL, value_width);
                const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
                bf16* place = packed_values + p * PANEL * KEYS + (k / DEPTH * DEPTH + k % DEPTH * 2) * PANEL;
                _mm512_store_si512(place, _mm512_permutex2var_epi64(low, FIRST_LANES, high));
                _mm512_store_si512(place + PANEL * KEYS, _mm512_permutex2var_epi64(low, LAST_LANES, high));
            }
    }

    void multiply_keys(int64_t first, int64_t count) {
        if (!turns_keys) return multiply(scores, queries, first, count, depth, packed_keys, KEYS / PANEL);
        multiply(sums_of_block, packed_keys, 0, KEYS, depth, queries, 1);
        for (int64_t key = 0; key < KEYS; key += LANES)
            for (int64_t r = 0; r < count; r += 4) turn_four(key, r);
    }

    void put_weights(int64_t r, int64_t key, Floats weight, Floats next) {
        const Bits w = upper_half(weight), n = upper_half(next);
        const Bits w_rest = bits_of<Bits>(weight - bits_of<Floats>(w)), n_rest = bits_of<Bits>(next - bits_of<Floats>(n));
        const Bits upper = w >> 16 | n, lower = w_rest >> 16 | (n_rest & 0xffff0000);
        memcpy((void*)prepared(weights, r, key, KEYS), &upper, sizeof upper);
        memcpy((void*)prepared(weights, lower_rows + r, key, KEYS), &lower, sizeof lower);
    }

    void add_values(int64_t count, const float* fade, float* sums) {
        const int64_t width = round_up(value_width, PANEL), all = 2 * lower_rows;
        const int64_t most = all > way.few_rows ? way.panels : way.few_panels;
        for (int64_t p = 0; p * PANEL < width; p += most) {
            const int64_t left = width / PANEL - p, some = left < most ? left : most;
            multiply(sums_of_block, weights, 0, all, KEYS, packed_values + p * PANEL * KEYS, some);
            const float *upper = sums_of_block, *lower = sums_of_block + lower_rows * some * PANEL;
            for (int64_t r = 0; r < count; ++r, upper += some * PANEL, lower += some * PANEL)
                for (int64_t at = 0; at < some * PANEL; at += LANES) {
                    float* place = sums + r * width + p * PANEL;
                    const Floats sum = load(upper, Block{at}) + load(lower, Block{at});
                    store(place, Block{at}, fma(load(place, Block{at}), lanes(fade[r]), sum));
                }
        }
    }

   private:
    const Way<bf16>& way;
    const int64_t rows, key_width, value_width, depth, panels;
    const int64_t lower_rows;  // the row of the first lower half
    const bool turns_keys;
    float* sums_of_block;
    bf16 *queries, *packed_keys, *weights, *packed_values;

    // Where the way expects 32 elements of row r from `at` on.
    bf16* prepared(bf16* x, int64_t r, int64_t at, int64_t inner) const {
        const int64_t step = way.row_step;
        return x + r / step * step * inner + at * step + r % step * DEPTH;
    }

    // Pairs along the width, which are words here
    void pack_panel(bf16* panel, const bf16* const* row) const {
        for (int64_t at = 0; at < depth; at += DEPTH) {
            Floats words[LANES];
            for (int lane = 0; lane < LANES; ++lane) words[lane] = (Floats)load_pairs(row[lane], at, key_width);
            transpose(words);
            memcpy((void*)(panel + at * PANEL), words, sizeof words);
        }
    }

    // Some rows of x by some panels of w, in blocks, the sums as if in one
    void multiply(float* sums, const bf16* x, int64_t first, int64_t count, int64_t inner, const bf16* w,
                  int64_t some) const {
        const int64_t most = count > way.few_rows ? way.rows : way.few_rows;
        for (int64_t r = 0; r < count; r += most) {
            const int64_t left = count - r < most ? count - r : most;
            way.block(sums + r * some * PANEL, x, first + r, left, inner, w, some, Ahead{nullptr, 0});
        }
    }

    // The sums of four rows from r on with 16 keys, which lie as [key, row], become their scores.
    void turn_four(int64_t key, int64_t r) const {
        const float* from = sums_of_block + key * PANEL + r;
        __m512 sums[4];  // of keys i, i + 4, i + 8 and i + 12
        for (int64_t i = 0; i < 4; ++i, from += PANEL) {
            sums[i] = _mm512_castps128_ps512(_mm_load_ps(from));
            sums[i] = _mm512_mask_broadcast_f32x4(sums[i], 0x00f0, _mm_load_ps(from + 4 * PANEL));
            sums[i] = _mm512_mask_broadcast_f32x4(sums[i], 0x0f00, _mm_load_ps(from + 8 * PANEL));
            sums[i] = _mm512_mask_broadcast_f32x4(sums[i], 0xf000, _mm_load_ps(from + 12 * PANEL));
        }
        const __m512d low = (__m512d)_mm512_unpacklo_ps(sums[0], sums[1]);
        const __m512d high = (__m512d)_mm512_unpackhi_ps(sums[0], sums[1]);
        const __m512d next_low = (__m512d)_mm512_unpacklo_ps(sums[2], sums[3]);
        const __m512d next_high = (__m512d)_mm512_unpackhi_ps(sums[2], sums[3]);
        float* place = scores + r * KEYS + key;
        _mm512_store_pd(place, _mm512_unpacklo_pd(low, next_low));
        _mm512_store_pd(place + KEYS, _mm512_unpackhi_pd(low, next_low));
        _mm512_store_pd(place + 2 * KEYS, _mm512_unpacklo_pd(high, next_high));
        _mm512_store_pd(place + 3 * KEYS, _mm512_unpackhi_pd(high, next_high));
    }
};

}  // namespace sage
#endif
