// The two products of attention in bf16 by AMX or AVX512_BF16, which take keys and values packed as weights are (ways.h).
//
// A weight of attention is split into two bf16, so that its 16 bits of mantissa cost next to nothing in accuracy. Of few
// rows, AMX multiplies the keys as they lie by the packed queries instead of the other way round; the sums are the same.
#pragma once

#include "attention_products.h"

#if defined(__AVX512BF16__)
namespace sage {

const __m512i FIRST_LANES = {0, 1, 8, 9, 2, 3, 10, 11}, LAST_LANES = {4, 5, 12, 13, 6, 7, 14, 15};

// A weight to the nearest bf16, ties upwards, as the bits of a float32
inline Bits upper_half(Floats weight) { return (bits_of<Bits>(weight) + 0x8000) & 0xffff0000; }

// Which of 32 elements from `at` on a row has
inline __mmask32 inside(int64_t at, int64_t length) { return length - at < DEPTH ? (1u << (length - at)) - 1 : ~0u; }

// 32 elements, zero where they are not inside
inline __m512i load_pairs(__mmask32 columns, const bf16* row) { return _mm512_maskz_loadu_epi16(columns, row); }

// How far apart 16 rows lie, if they lie evenly; else 0.
inline int64_t distance(const bf16* const* row) {
    const int64_t bytes = (const char*)row[1] - (const char*)row[0];
    const __m512i steps = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(bytes));
    const __m512i first = _mm512_add_epi64(_mm512_set1_epi64((int64_t)row[0]), steps);
    const __m512i second = _mm512_add_epi64(first, _mm512_set1_epi64(8 * bytes));
    const int uneven = _mm512_cmpneq_epi64_mask(first, _mm512_loadu_si512(row)) |
                       _mm512_cmpneq_epi64_mask(second, _mm512_loadu_si512(row + 8));
    return uneven ? 0 : bytes / (int64_t)sizeof(bf16);
}

class PairProducts {
   public:
    PairProducts(int64_t rows, int64_t key_width, int64_t value_width)
        : way(sage::way<bf16, 6, 4, 4, 2>()), rows(rows), key_width(key_width), value_width(value_width),
          depth(round_up(key_width, DEPTH)), panels(round_up(value_width, PANEL) / PANEL), is_tiled(way.row_step == BLOCK),
          turns_keys(is_tiled && rows <= BLOCK), weight_row(is_tiled ? DEPTH : KEYS), weight_step(is_tiled ? BLOCK : 1) {
        const int64_t whole = round_up(rows, BLOCK);
        scores = scratch<float>(0, 2 * BLOCK * KEYS + 2 * MAX_SUMS);
        sums_of_block = scores + 2 * BLOCK * KEYS;
        queries = scratch<bf16>(0, (whole + KEYS) * depth + 4 * BLOCK * KEYS + KEYS * round_up(panels, 2) * PANEL);
        packed_keys = queries + whole * depth;
        weights = packed_keys + KEYS * depth;
        packed_values = weights + 4 * BLOCK * KEYS;
        way.begin();
    }
    ~PairProducts() { way.end(); }
    PairProducts(const PairProducts&) = delete;

    float* scores_of(int64_t block) const { return scores + block % 2 * BLOCK * KEYS; }

    void take_queries(const bf16* const* row) {
        if (!turns_keys) return way.prepare(queries, row, rows, key_width);
        const bf16* padded[BLOCK];
        for (int64_t r = 0; r < BLOCK; ++r) padded[r] = row[r < rows ? r : 0];
        pack_panel(queries, padded);
    }

    void take_keys(const bf16* const* row) {
        for (int64_t key = 0; key < KEYS; key += PANEL)
            if (turns_keys)
                lay_keys(key, row + key);
            else
                pack_panel(packed_keys + key * depth, row + key);
    }

    // Pairs are of keys 16 apart, as the weights' are
    void take_values(const bf16* const* row) {
        for (int64_t p = 0; p < panels; p += 2) {
            const __mmask32 columns = inside(p * PANEL, value_width);
            bf16* place = packed_values + p * PANEL * KEYS;
            for (int64_t i = 0; i < KEYS / 2; ++i, place += 2 * PANEL) {
                const int64_t key = i / PANEL * DEPTH + i % PANEL;
                const __m512i a = load_pairs(columns, row[key] + p * PANEL);
                const __m512i b = load_pairs(columns, row[key + PANEL] + p * PANEL);
                const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
                _mm512_store_si512(place, _mm512_permutex2var_epi64(low, FIRST_LANES, high));
                _mm512_store_si512(place + KEYS * PANEL, _mm512_permutex2var_epi64(low, LAST_LANES, high));
            }
        }
    }

    void multiply_keys(int64_t block, int64_t first, int64_t count) {
        float* to = scores_of(block);
        if (!turns_keys) return multiply(to, queries, first, count, depth, packed_keys, KEYS / PANEL);
#if defined(SAGE_AMX)
        for (int64_t key = 0; key < KEYS; key += PANEL) {
            amx::rows_as_they_lie(sums_of_block, keys[key / PANEL].row, keys[key / PANEL].apart, depth, queries);
            for (int64_t r = 0; r < count; r += 4) turn_four(to + r * KEYS + key, sums_of_block + r);
        }
#endif
    }

    void put_weights(int64_t block, int64_t i, int64_t key, Floats weight, Floats next) {
        const Bits w = upper_half(weight), n = upper_half(next);
        const Bits w_rest = bits_of<Bits>(weight - bits_of<Floats>(w)), n_rest = bits_of<Bits>(next - bits_of<Floats>(n));
        const Bits upper = w >> 16 | n, lower = w_rest >> 16 | (n_rest & 0xffff0000);
        bf16* place = weights_of(block) + i * weight_row + key * weight_step;
        memcpy((void*)place, &upper, sizeof upper);
        memcpy((void*)(place + BLOCK * KEYS), &lower, sizeof lower);
    }

    void add_values(int64_t block, int64_t count, Floats fade, float* sums) {
        fade_rows(count, fade, sums, panels * PANEL);
        for (int64_t p = 0; p < panels; p += 4) {
            const int64_t some = panels - p < 4 ? panels - p : 4;
            add_panels(weights_of(block), count, sums + p * PANEL, packed_values + p * PANEL * KEYS, some);
        }
    }

   private:
    struct Rows {
        const bf16* row;
        int64_t apart;
    };

    const Way<bf16>& way;
    const int64_t rows, key_width, value_width, depth, panels;
    const bool is_tiled, turns_keys;
    const int64_t weight_row, weight_step;  // where a weight lies, by the way
    float *scores, *sums_of_block;
    bf16 *queries, *packed_keys, *weights, *packed_values;
    Rows keys[KEYS / PANEL];  // 16 at a time, if they are not packed

    bf16* weights_of(int64_t block) const { return weights + block % 2 * 2 * BLOCK * KEYS; }

    // Pairs along the width, which are words here
    void pack_panel(bf16* panel, const bf16* const* row) const {
        for (int64_t at = 0; at < depth; at += DEPTH) {
            const __mmask32 columns = inside(at, key_width);
            Floats words[LANES];
            for (int lane = 0; lane < LANES; ++lane)
                words[lane] = (Floats)load_pairs(columns, row[lane] + at);
            transpose(words);
            memcpy((void*)(panel + at * PANEL), words, sizeof words);
        }
    }

    // 16 keys side by side: where they are if they are so, else copied.
    void lay_keys(int64_t key, const bf16* const* row) {
        keys[key / PANEL] = {row[0], depth == key_width ? distance(row) : 0};
        if (keys[key / PANEL].apart) return;
        bf16* copy = packed_keys + key * depth;
        for (int64_t k = 0; k < PANEL; ++k)
            for (int64_t at = 0; at < depth; at += DEPTH)
                _mm512_store_si512(copy + k * depth + at, load_pairs(inside(at, key_width), row[k] + at));
        keys[key / PANEL] = {copy, depth};
    }

    // Some rows of x by some panels of w, in blocks, the sums as if in one
    void multiply(float* sums, const bf16* x, int64_t first, int64_t count, int64_t inner, const bf16* w,
                  int64_t some) const {
        for (int64_t r = 0; r < count; r += way.few_rows) {
            const int64_t left = count - r < way.few_rows ? count - r : way.few_rows;
            way.block(sums + r * some * PANEL, x, first + r, left, inner, w, some, Ahead{nullptr, 0});
        }
    }

    void add_panels(const bf16* upper, int64_t count, float* sums, const bf16* w, int64_t some) const {
        const int64_t width = panels * PANEL;
        const bf16* lower = upper + BLOCK * KEYS;
#if defined(SAGE_AMX)
        if (is_tiled) return amx::add_halves(sums, width, upper, lower, KEYS / DEPTH, w, some);
#endif
        float* sums_of_lower = sums_of_block + BLOCK * some * PANEL;
        multiply(sums_of_block, upper, 0, count, KEYS, w, some);
        multiply(sums_of_lower, lower, 0, count, KEYS, w, some);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t at = r * some * PANEL, to = r * width; at < (r + 1) * some * PANEL; at += LANES, to += LANES)
                store(sums, Block{to}, load(sums, Block{to}) + load(sums_of_block, Block{at}) + load(sums_of_lower, Block{at}));
    }

    // Of 16 keys the sums of four rows, [16, PANEL], become those rows' scores.
    static void turn_four(float* to, const float* from) {
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
        _mm512_store_pd(to, _mm512_unpacklo_pd(low, next_low));
        _mm512_store_pd(to + KEYS, _mm512_unpackhi_pd(low, next_low));
        _mm512_store_pd(to + 2 * KEYS, _mm512_unpacklo_pd(high, next_high));
        _mm512_store_pd(to + 3 * KEYS, _mm512_unpackhi_pd(high, next_high));
    }
};

}  // namespace sage
#endif
