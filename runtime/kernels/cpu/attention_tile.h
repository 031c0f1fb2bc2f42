// One tile of attention: the query heads of one key head, times some query positions, over its keys 64 at a time.
//
// The keys and values of a step are packed once for all rows of the tile (Dao et al. 2022). Rows are computed in blocks
// of 16; blocks that see no key of a step are skipped, and masks are evaluated only if not all pairs of a block are
// visible.
#pragma once

#include "attention_gemm_bf16.h"
#include "attention_gemm_f32.h"
#include "attention_keys.h"
#include "attention_rows.h"
#include "softmax_state.h"

namespace sage {

// The hooks of an attention op: how scores are modified, which pairs are visible, and the range of keys that follows.
template <class Score, class Mask, class Range>
struct AttentionHooks {
    Score score_mod;
    Mask mask_mod;
    Range range;
    bool modifies_scores;
    bool is_range;  // the mask is equivalent to the range

    KeyRange visible_to_any(int64_t first, int64_t last, int64_t length) const { return range(first, last, length); }
    KeyRange visible_to_all(int64_t first, int64_t last, int64_t length) const {
        return is_range ? range(last, first, length) : KeyRange{0, 0};
    }
};
template <class Score, class Mask, class Range>
AttentionHooks(Score, Mask, Range, bool, bool) -> AttentionHooks<Score, Mask, Range>;

// The sizes and tensors of one call. Query position i of sequence b is row keys.row(b, i) of q and o.
template <class E>
struct AttentionCall {
    int64_t sequences, query_heads, key_heads, key_width, value_width;
    const E* q;
    int64_t q_row, q_head;
    E* o;
    int64_t o_row, o_head;
    const E* sinks;
    const float* slopes;
    float scale;

    int64_t group() const { return query_heads / key_heads; }
};

struct AttentionTile {
    int64_t sequence, key_head, position, positions;  // first position and number of positions among the query rows
};

// The keys that are visible to any row of a tile.
template <class Keys, class Hooks>
inline KeyRange tile_range(const Keys& keys, const Hooks& hooks, const AttentionTile& tile) {
    int64_t first = keys.position(tile.sequence, tile.position), length = keys.length(tile.sequence);
    return hooks.visible_to_any(first, first + tile.positions - 1, length);
}

// Up to 64 keys and values from a multiple of 64 on, so that all tiles and chunks of a prompt accumulate in the same
// steps. Invisible keys and values point to rows of zeros.
template <class Stored>
struct KeyStep {
    KeyRange range;
    const Stored* key[KEYS];
    const Stored* value[KEYS];

    template <class Keys>
    void find(const Keys& keys, const AttentionTile& tile, KeyRange visible, int64_t first, const Stored* zeros) {
        range = {first, maximum(first, minimum(first + KEYS, visible.stop))};
        const int64_t to = range.stop - first, from = minimum(to, maximum(visible.first - first, (int64_t)0));
        keys.find(tile.sequence, tile.key_head, first + from, first + to, key + from, value + from);
        for (int64_t n = 0; n < from; ++n) key[n] = value[n] = zeros;
        for (int64_t n = to; n < KEYS; ++n) key[n] = value[n] = zeros;
    }
};

inline int64_t step_of(int64_t key) { return key / KEYS * KEYS; }

// Computes one tile over ranges of at most KEYS_PER_PART keys.
template <class Gemms, class E, class Keys, class Hooks>
class TileWorker {
    using Stored = typename Keys::Stored;

  public:
    TileWorker(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks, const AttentionTile& tile)
        : call_(call), keys_(keys), hooks_(hooks), tile_(tile), group_(call.group()), rows_(tile.positions * group_),
          width_(round_up(call.value_width, LANES)),
          modifies_scores_(hooks.modifies_scores || call.slopes || call.scale <= 0),
          factor_(LOG2_E * (modifies_scores_ ? 1.0f : call.scale)), gemms_(rows_, call.key_width, call.value_width),
          opened_keys_(call.key_width, Scratch::OPENED_KEYS), opened_values_(call.value_width, Scratch::OPENED_VALUES) {
        blocks_ = scratch<RowBlock>(Scratch::ROW_BLOCKS, rows_ / BLOCK + 1);
        const int64_t longest = stored_width<Stored>(maximum(call.key_width, call.value_width));
        zeros_ = scratch<Stored>(Scratch::ZERO_ROW, longest);
        memset((void*)zeros_, 0, longest * sizeof(Stored));
        const E** row = scratch<const E*>(Scratch::QUERY_ROWS, rows_);
        for (int64_t r = 0; r < rows_; ++r) row[r] = call.q + row_of(r) * call.q_row + head(r) * call.q_head;
        gemms_.pack_queries(row);
    }

    // Computes the softmax state over a range of keys. Meanwhile the rows that are read next are prefetched: those of
    // the next step, or the first ones of `next_tile`, which may be another tile or the next part of this one.
    void attend_range(KeyRange range, SoftmaxState state, const AttentionTile& next_tile, KeyRange next_range) {
        state.reset(rows_, width_);
        if (range.first >= range.stop) return;
        KeyStep<Stored> steps[2], *step = steps, *next = steps + 1;
        int64_t first = step_of(range.first);
        step->find(keys_, tile_, range, first, zeros_);
        for (; first < range.stop; first += KEYS) {
            const bool is_last = first + KEYS >= range.stop;
            const KeyRange other = is_last ? next_range : range;
            next->find(keys_, is_last ? next_tile : tile_, other, is_last ? step_of(other.first) : first + KEYS,
                       zeros_);
            gemms_.pack_keys(opened_keys_.open(step->key), {next->key, stored_width<Stored>(call_.key_width)});
            gemms_.pack_values(opened_values_.open(step->value),
                               {next->value, stored_width<Stored>(call_.value_width)});
            attend_step(step->range, state);
            std::swap(step, next);
        }
    }

    // Normalises the rows by their sums, to which a sink adds its power, and rounds once to the element type. A row
    // without visible keys is 0.
    void store_rows(SoftmaxState state) {
        for (int64_t r = 0; r < rows_; ++r) {
            E* row = call_.o + row_of(r) * call_.o_row + head(r) * call_.o_head;
            const float total = reduce_sum(load(state.total + r * LANES, Block{0}));
            const float sink = call_.sinks ? exp2(widen(call_.sinks[head(r)]) * LOG2_E - state.maximum[r]) : 0.0f;
            const float scale = total == 0.0f ? 0.0f : 1.0f / (total + sink);
            sweep(call_.value_width, [&](auto i) { store(row, i, to<E>(load(state.values + r * width_, i) * scale)); });
        }
    }

    int64_t num_rows() const { return rows_; }

  private:
    const AttentionCall<E>& call_;
    const Keys& keys_;
    const Hooks& hooks_;
    const AttentionTile& tile_;
    const int64_t group_, rows_, width_;
    const bool modifies_scores_;
    const float factor_;  // converts a score to an exponent of two
    Gemms gemms_;
    OpenedRows<E, Stored> opened_keys_, opened_values_;

    int64_t position(int64_t r) const { return keys_.position(tile_.sequence, tile_.position + r / group_); }
    int64_t row_of(int64_t r) const { return keys_.row(tile_.sequence, tile_.position + r / group_); }
    int64_t head(int64_t r) const { return tile_.key_head * group_ + r % group_; }

    // Up to 16 rows from `first` on: whether all keys of the step are visible to all of them, and the factors that
    // rescale their state to the new maxima.
    struct RowBlock {
        int64_t first, count;
        bool is_whole;
        Floats rescale;
    };
    RowBlock* blocks_;
    Stored* zeros_;

    // Adds the keys of a step to the state of all rows. The blocks form a pipeline: while vector units compute the
    // weights of one block, AMX multiplies the keys of the next block and the values of the previous one.
    void attend_step(KeyRange step, SoftmaxState state) {
        const int64_t count = find_blocks(step);
        for (int64_t i = 0; i < count + 2; ++i) {
            if (i < count) gemms_.multiply_keys(i, blocks_[i].first, blocks_[i].count);
            if (i >= 2) {
                const RowBlock& last = blocks_[i - 2];
                gemms_.add_values(i - 2, last.count, last.rescale, state.values + last.first * width_);
            }
            if (i >= 1 && i <= count) update_softmax(i - 1, step, state);
        }
    }

    // Finds the blocks of rows to which any key of the step is visible.
    int64_t find_blocks(KeyRange step) {
        const int64_t length = keys_.length(tile_.sequence);
        int64_t found = 0;
        for (int64_t r = 0; r < rows_; r += BLOCK) {
            const int64_t count = rows_ - r < BLOCK ? rows_ - r : BLOCK;
            const int64_t first = position(r), last = position(r + count - 1);
            if (!step.overlaps(hooks_.visible_to_any(first, last, length))) continue;
            const bool is_whole =
                step.stop - step.first == KEYS && hooks_.visible_to_all(first, last, length).contains(step);
            blocks_[found++] = {r, count, is_whole, Floats{}};
        }
        return found;
    }

    // Replaces the scores of a block by weights under the new maxima, and adds the weights to the totals.
    void update_softmax(int64_t number, KeyRange step, SoftmaxState state) {
        RowBlock& block = blocks_[number];
        alignas(64) float shift[BLOCK], rescale[BLOCK];
        Floats top[BLOCK];
        opened_keys_.scale(gemms_.scores_of(number), block.count);
        for (int64_t i = 0; i < BLOCK; ++i)
            top[i] = i >= block.count                      ? broadcast(-INFINITY)
                     : modifies_scores_ || !block.is_whole ? modify_scores(number, i, step)
                                                           : max_score(number, i);
        const Floats before = load(state.maximum + block.first, Block{0});
        const Floats now = hardware_max(max_of_rows(top) * factor_, before);
        block.rescale = exp2(before - shift_of(now));
        store(state.maximum + block.first, Block{0}, now);
        store(shift, Block{0}, shift_of(now));
        store(rescale, Block{0}, block.rescale);
        for (int64_t i = 0; i < block.count; ++i) {
            float* total = state.total + (block.first + i) * LANES;
            store(total, Block{0},
                  fma(load(total, Block{0}), broadcast(rescale[i]), exponentiate(number, i, shift[i])));
        }
    }

    // The largest score of a row, by lane.
    Floats max_score(int64_t number, int64_t i) const {
        const float* row = gemms_.scores_of(number) + i * KEYS;
        Floats top = load(row, Block{0});
        for (int v = LANES; v < KEYS; v += LANES) top = hardware_max(load(row, Block{v}), top);
        return top;
    }

    // Applies the scale and the hooks to the scores of a row, -inf for invisible keys; returns the largest by lane.
    Floats modify_scores(int64_t number, int64_t i, KeyRange step) const {
        const int32_t m = (int32_t)position(blocks_[number].first + i), h = (int32_t)head(blocks_[number].first + i);
        float* row = gemms_.scores_of(number) + i * KEYS;
        Floats top = broadcast(-INFINITY);
        for (int v = 0; v < KEYS; v += LANES) {
            const Ints n = LANE_NUMBERS + (int32_t)(step.first + v);
            Floats score = load(row, Block{v});
            if (modifies_scores_) {
                score *= call_.scale;
                if (call_.slopes) score += call_.slopes[h] * __builtin_convertvector(n - m, Floats);
                score = hooks_.score_mod(score, m, n, h);
            }
            const Ints is_visible = hooks_.mask_mod(m, n, h) & (n < (int32_t)step.stop);
            score = is_visible ? score : broadcast(-INFINITY);
            store(row, Block{v}, score);
            top = hardware_max(score, top);
        }
        return top;
    }

    // Replaces the scores of a row by their weights; returns the sums of the weights by lane.
    Floats exponentiate(int64_t number, int64_t i, float shift) {
        const float* row = gemms_.scores_of(number) + i * KEYS;
        Floats sum = {};
        for (int v = 0; v < KEYS; v += 2 * LANES) {
            const Floats weight = exp2(fma(load(row, Block{v}), broadcast(factor_), broadcast(-shift)));
            const Floats next = exp2(fma(load(row, Block{v + LANES}), broadcast(factor_), broadcast(-shift)));
            sum += weight + next;
            gemms_.store_weights(number, i, v, opened_values_.scaled(weight, v),
                                 opened_values_.scaled(next, v + LANES));
        }
        return sum;
    }
};

}  // namespace sage
