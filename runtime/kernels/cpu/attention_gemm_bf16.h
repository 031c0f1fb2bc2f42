// The two GEMMs of attention in bf16, on AMX or AVX512_BF16. Keys and values are packed like weights (packed.h).
//
// A weight of attention is split into the sum of two bf16: 16 bits of mantissa, so that rounding the weights costs
// almost no accuracy. With few rows, AMX computes the transposed product, keys in place times packed queries: the
// queries are packed once, whereas packing the keys for a single row would cost more than the product. The sums are the
// same.
#pragma once

#include "attention_few_rows.h"

#if defined(__AVX512BF16__)
namespace sage {

// A weight rounded to the nearest bf16, ties up, as the bits of a float32.
inline Bits upper_half(Floats weight) { return (bits_of<Bits>(weight) + 0x8000) & 0xffff0000; }

// The distance between consecutive rows if 16 rows are equally spaced, else 0.
inline int64_t uniform_stride(const bf16* const* row) {
    const int64_t bytes = (const char*)row[1] - (const char*)row[0];
    const __m512i steps = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(bytes));
    const __m512i first = _mm512_add_epi64(_mm512_set1_epi64((int64_t)row[0]), steps);
    const __m512i second = _mm512_add_epi64(first, _mm512_set1_epi64(8 * bytes));
    const int differs = _mm512_cmpneq_epi64_mask(first, _mm512_loadu_si512(row)) |
                        _mm512_cmpneq_epi64_mask(second, _mm512_loadu_si512(row + 8));
    return differs ? 0 : bytes / (int64_t)sizeof(bf16);
}

class PairGemms {
  public:
    PairGemms(int64_t rows, int64_t key_width, int64_t value_width)
        : microkernel_(select_microkernel<bf16, bf16, MAX_ROWS, MAX_PANELS, 4, 2>()), scope_(microkernel_), rows_(rows),
          key_width_(key_width), value_width_(value_width), depth_(round_up(key_width, DEPTH)),
          panels_(round_up(value_width, PANEL) / PANEL), is_tiled_(microkernel_.row_step == BLOCK),
          uses_keys_in_place_(is_tiled_ && rows <= BLOCK),
          has_few_rows_(!is_tiled_ && rows <= few_rows::MAX_ROWS && panels_ % 2 == 0),
          weight_row_(is_tiled_ ? DEPTH : KEYS), weight_step_(is_tiled_ ? BLOCK : 1) {
        const int64_t padded = round_up(rows, BLOCK);
        scores_ = scratch<float>(Scratch::ATTENTION_FLOATS, 2 * BLOCK * KEYS + 2 * MAX_SUMS);
        block_sums_ = scores_ + 2 * BLOCK * KEYS;
        const int64_t pairs = (padded + KEYS) * depth_ + 4 * BLOCK * KEYS + KEYS * round_up(panels_, 2) * PANEL;
        queries_ = scratch<bf16>(Scratch::ATTENTION_PAIRS, pairs);
        packed_keys_ = queries_ + padded * depth_;
        weights_ = packed_keys_ + KEYS * depth_;
        packed_values_ = weights_ + 4 * BLOCK * KEYS;
    }

    float* scores_of(int64_t block) const { return scores_ + block % 2 * BLOCK * KEYS; }

    void pack_queries(const bf16* const* row) {
        if (!is_tiled_) return pairs::copy_rows(queries_, row, rows_, key_width_, depth_);
        if (!uses_keys_in_place_) return microkernel_.prepare(queries_, row, rows_, key_width_);
        const bf16* padded[BLOCK];
        for (int64_t r = 0; r < BLOCK; ++r) padded[r] = row[r < rows_ ? r : 0];
        pack_panel(queries_, padded, [] {});
    }

    void pack_keys(const bf16* const* row, RowPrefetch ahead) {
        if (has_few_rows_) return few_keys_ = {row, ahead, key_width_}, void();
        for (int64_t key = 0; key < KEYS; key += PANEL)
            if (uses_keys_in_place_)
                locate_keys(key, row + key);
            else
                pack_panel(packed_keys_ + key * depth_, row + key, [&] { ahead.lines(PANEL); });
        ahead.rest();
    }

    // A pair has two keys that are 16 apart, as has a pair of weights: store_weights then needs no shuffle.
    void pack_values(const bf16* const* row, RowPrefetch ahead) {
        if (has_few_rows_) return few_values_ = {row, ahead, value_width_}, void();
        for (int64_t p = 0; p < panels_; p += 2) {
            const __mmask32 columns = active_lanes(p * PANEL, value_width_);
            bf16* target = packed_values_ + p * PANEL * KEYS;
            for (int64_t i = 0; i < KEYS / 2; ++i, target += 2 * PANEL) {
                const int64_t key = i / PANEL * DEPTH + i % PANEL;
                ahead.lines(2);
                const __m512i a = load_pairs(columns, row[key] + p * PANEL);
                const __m512i b = load_pairs(columns, row[key + PANEL] + p * PANEL);
                const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
                _mm512_store_si512(target, _mm512_permutex2var_epi64(low, FIRST_LANES, high));
                _mm512_store_si512(target + KEYS * PANEL, _mm512_permutex2var_epi64(low, LAST_LANES, high));
            }
        }
    }

    void multiply_keys(int64_t block, int64_t first, int64_t count) {
        float* scores = scores_of(block);
        if (has_few_rows_) return few_rows::keys_of(count, few_rows::Rows{})(scores, queries_, depth_, few_keys_);
        if (!is_tiled_)
            return Tiles::multiply(scores, queries_ + first * depth_, count, depth_, packed_keys_, KEYS / PANEL);
        if (!uses_keys_in_place_)
            return microkernel_.block(scores, queries_, first, count, depth_, packed_keys_, KEYS / PANEL, Prefetch{});
#if defined(SAGE_AMX)
        for (int64_t key = 0; key < KEYS; key += PANEL) {
            amx::gemm_strided(block_sums_, keys_[key / PANEL].row, keys_[key / PANEL].stride, depth_, queries_);
            for (int64_t r = 0; r < count; r += 4) transpose_four(scores + r * KEYS + key, block_sums_ + r);
        }
#endif
    }

    void store_weights(int64_t block, int64_t i, int64_t key, Floats weight, Floats next) {
        const Bits w = upper_half(weight), n = upper_half(next);
        const Bits w_rest = bits_of<Bits>(weight - bits_of<Floats>(w));
        const Bits n_rest = bits_of<Bits>(next - bits_of<Floats>(n));
        const Bits upper = w >> 16 | n, lower = w_rest >> 16 | (n_rest & 0xffff0000);
        bf16* target = weights_of(block) + i * weight_row_ + key * weight_step_;
        memcpy((void*)target, &upper, sizeof upper);
        memcpy((void*)(target + BLOCK * KEYS), &lower, sizeof lower);
    }

    void add_values(int64_t block, int64_t count, Floats rescale, float* sums) {
        alignas(64) float factors[BLOCK];
        store(factors, Block{0}, rescale);
        const int64_t width = panels_ * PANEL;
        const bf16 *upper = weights_of(block), *lower = upper + BLOCK * KEYS;
        if (has_few_rows_) {
            const few_rows::Values add = few_rows::values_of(count, width, few_rows::Rows{});
            return add(sums, width, factors, upper, lower, few_values_);
        }
        if (is_tiled_) rescale_rows(count, rescale, sums, width);
        for (int64_t p = 0; p < panels_; p += MAX_PANELS) {
            const int64_t panels = minimum(panels_ - p, MAX_PANELS);
            const bf16* w = packed_values_ + p * PANEL * KEYS;
#if defined(SAGE_AMX)
            if (is_tiled_) {
                amx::add_split(sums + p * PANEL, width, upper, lower, KEYS / DEPTH, w, panels);
                continue;
            }
#endif
            Tiles::add_split(sums + p * PANEL, width, factors, upper, lower, count, KEYS, w, panels);
        }
    }

  private:
    // Without AMX, tiles of 6 rows by 4 panels: 24 sums, 4 weights and a broadcast value fit into 32 registers.
    static constexpr int64_t MAX_ROWS = 6, MAX_PANELS = 4;
    using Tiles = pairs::Tiles<MAX_ROWS, MAX_PANELS>;

    struct Rows {
        const bf16* row;
        int64_t stride;
    };

    const Microkernel<bf16>& microkernel_;
    const MicrokernelScope<bf16> scope_;
    const int64_t rows_, key_width_, value_width_, depth_, panels_;
    const bool is_tiled_, uses_keys_in_place_, has_few_rows_;
    const int64_t weight_row_, weight_step_;  // the layout of prepared weights, which depends on the microkernel
    float *scores_, *block_sums_;
    bf16 *queries_, *packed_keys_, *weights_, *packed_values_;
    Rows keys_[KEYS / PANEL];  // 16 keys each, if they are used in place
    few_rows::Operand few_keys_{}, few_values_{};

    bf16* weights_of(int64_t block) const { return weights_ + block % 2 * 2 * BLOCK * KEYS; }

    // Packs 16 rows as a panel: a transpose of the pairs along the width, each of which is a word. Each transpose reads
    // a line of every row; `step` is called before it.
    template <class Step>
    void pack_panel(bf16* panel, const bf16* const* row, Step&& step) const {
        for (int64_t at = 0; at < depth_; at += DEPTH) {
            step();
            const __mmask32 columns = active_lanes(at, key_width_);
            Floats words[LANES];
            for (int lane = 0; lane < LANES; ++lane) words[lane] = (Floats)load_pairs(columns, row[lane] + at);
            transpose(words);
            memcpy((void*)(panel + at * PANEL), words, sizeof words);
        }
    }

    // Uses 16 keys in place if they are equally spaced and fill whole tiles, else a contiguous copy.
    void locate_keys(int64_t key, const bf16* const* row) {
        keys_[key / PANEL] = {row[0], depth_ == key_width_ ? uniform_stride(row) : 0};
        if (keys_[key / PANEL].stride) return;
        bf16* copy = packed_keys_ + key * depth_;
        for (int64_t k = 0; k < PANEL; ++k)
            for (int64_t at = 0; at < depth_; at += DEPTH)
                _mm512_store_si512(copy + k * depth_ + at, load_pairs(active_lanes(at, key_width_), row[k] + at));
        keys_[key / PANEL] = {copy, depth_};
    }

    // Transposes the sums [16, PANEL] of 16 keys into the scores of four rows.
    static void transpose_four(float* scores, const float* from) {
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
        _mm512_store_pd(scores, _mm512_unpacklo_pd(low, next_low));
        _mm512_store_pd(scores + KEYS, _mm512_unpackhi_pd(low, next_low));
        _mm512_store_pd(scores + 2 * KEYS, _mm512_unpacklo_pd(high, next_high));
        _mm512_store_pd(scores + 3 * KEYS, _mm512_unpackhi_pd(high, next_high));
    }
};

}  // namespace sage
#endif
