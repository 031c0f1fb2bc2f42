// A tile of attention: the query heads of one key head, times some query positions, go over their keys 64 at a time.
//
// A step's keys and values are packed once for all rows of the tile (Dao et al. 2022). Rows are computed in blocks of 16;
// blocks that see no key of a step are passed over, and masks are looked at only where not all of a block's pairs count.
#pragma once

#include "attention_keys.h"
#include "attention_pairs.h"
#include "attention_products.h"
#include "attention_seen.h"

namespace sage {

// The op's own part of attention: what becomes of a score, which pairs count, and which keys that leaves.
template <class Score, class Mask, class Range>
struct AttentionHooks {
    Score score_mod;
    Mask mask_mod;
    Range range;
    bool modifies;    // score_mod does anything
    bool is_bounded;  // mask_mod says nothing but the range

    KeyRange seen_by_any(int64_t first, int64_t last, int64_t length) const { return range(first, last, length); }
    KeyRange seen_by_all(int64_t first, int64_t last, int64_t length) const {
        return is_bounded ? range(last, first, length) : KeyRange{0, 0};
    }
};
template <class Score, class Mask, class Range>
AttentionHooks(Score, Mask, Range, bool, bool) -> AttentionHooks<Score, Mask, Range>;

// The sizes of one call. Query position i of sequence b is row row_of(b, i) of q and o.
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
    int64_t sequence, key_head, position, positions;  // positions of the sequence's query rows
};

// The keys that any row of a tile sees.
template <class Keys, class Hooks>
inline KeyRange tile_range(const Keys& keys, const Hooks& hooks, const AttentionTile& tile) {
    int64_t first = keys.position(tile.sequence, tile.position), length = keys.length(tile.sequence);
    return hooks.seen_by_any(first, first + tile.positions - 1, length);
}

// Up to 64 keys and values from a multiple of 64 on. Rows that are not seen are rows of zeros.
template <class E>
struct KeyStep {
    KeyRange range;
    const E* key[KEYS];
    const E* value[KEYS];

    template <class Keys>
    void find(const Keys& keys, const AttentionTile& tile, KeyRange seen, int64_t first, const E* zeros) {
        range = {first, maximum(first, minimum(first + KEYS, seen.stop))};
        const int64_t to = range.stop - first, from = minimum(to, maximum(seen.first - first, (int64_t)0));
        keys.find(tile.sequence, tile.key_head, first + from, first + to, key + from, value + from);
        for (int64_t n = 0; n < from; ++n) key[n] = value[n] = zeros;
        for (int64_t n = to; n < KEYS; ++n) key[n] = value[n] = zeros;
    }
};

inline int64_t step_of(int64_t key) { return key / KEYS * KEYS; }

template <class Element>
inline void fetch_rows(const Element* const* row, int64_t width) {
    for (int64_t r = 0; r < KEYS; ++r)
        for (int64_t at = 0; at < width; at += 64 / (int64_t)sizeof(Element)) __builtin_prefetch(row[r] + at);
}

// One tile's keys from `range.first` to `range.stop`, at most a part.
template <class Products, class E, class Keys, class Hooks>
class TileWorker {
   public:
    TileWorker(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks, const AttentionTile& tile)
        : call(call), keys(keys), hooks(hooks), tile(tile), group(call.group()), rows(tile.positions * group),
          width(round_up(call.value_width, LANES)), modifies(hooks.modifies || call.slopes || call.scale <= 0),
          factor(LOG2_E * (modifies ? 1.0f : call.scale)), products(rows, call.key_width, call.value_width) {
        blocks = scratch<RowBlock>(0, rows / BLOCK + 1);
        zeros = scratch<E>(5, maximum(call.key_width, call.value_width));
        memset((void*)zeros, 0, maximum(call.key_width, call.value_width) * sizeof(E));
        const E** row = scratch<const E*>(1, rows);
        for (int64_t r = 0; r < rows; ++r) row[r] = call.q + row_of(r) * call.q_row + head(r) * call.q_head;
        products.take_queries(row);
    }

    // What comes next is fetched meanwhile: the rows of the next step, or the first ones that follow, of this tile or another.
    void see(KeyRange range, Seen seen, const AttentionTile& following, KeyRange range_following) {
        seen.clear(rows, width);
        if (range.first >= range.stop) return;
        KeyStep<E> steps[2], *step = steps, *next = steps + 1;
        int64_t first = step_of(range.first);
        step->find(keys, tile, range, first, zeros);
        for (; first < range.stop; first += KEYS) {
            const bool is_last = first + KEYS >= range.stop;
            const KeyRange other = is_last ? range_following : range;
            next->find(keys, is_last ? following : tile, other, is_last ? step_of(other.first) : first + KEYS, zeros);
            fetch_rows(next->key, call.key_width);
            products.take_keys(step->key);
            fetch_rows(next->value, call.value_width);
            products.take_values(step->value);
            see_step(step->range, seen);
            std::swap(step, next);
        }
    }

    // Divides by the sums, to which a sink adds its power, and rounds; a row that saw no key is 0.
    void finish(Seen seen) {
        for (int64_t r = 0; r < rows; ++r) {
            E* row = call.o + row_of(r) * call.o_row + head(r) * call.o_head;
            const float total = sum_of_lanes(load(seen.total + r * LANES, Block{0}));
            const float sink = call.sinks ? power(value(call.sinks[head(r)]) * LOG2_E - seen.maximum[r]) : 0.0f;
            const float share = total == 0.0f ? 0.0f : 1.0f / (total + sink);
            sweep(call.value_width, [&](auto i) { store(row, i, to<E>(load(seen.values + r * width, i) * share)); });
        }
    }

    int64_t num_rows() const { return rows; }

   private:
    const AttentionCall<E>& call;
    const Keys& keys;
    const Hooks& hooks;
    const AttentionTile& tile;
    const int64_t group, rows, width;
    const bool modifies;
    const float factor;  // makes a score an exponent of two
    Products products;

    int64_t position(int64_t r) const { return keys.position(tile.sequence, tile.position + r / group); }
    int64_t row_of(int64_t r) const { return keys.row(tile.sequence, tile.position + r / group); }
    int64_t head(int64_t r) const { return tile.key_head * group + r % group; }

    // Up to 16 rows from `first` on: whether all of them see all keys of a step, and what is left of what they saw before.
    struct RowBlock {
        int64_t first, count;
        bool is_whole;
        Floats fade;
    };
    RowBlock* blocks;
    E* zeros;

    // All rows see the keys of a step. Blocks overlap: while vectors weigh one, tiles multiply the keys of the next one and
    // the values of the last one.
    void see_step(KeyRange step, Seen seen) {
        const int64_t count = find_blocks(step);
        for (int64_t i = 0; i < count + 2; ++i) {
            if (i < count) products.multiply_keys(i, blocks[i].first, blocks[i].count);
            if (i >= 2) {
                const RowBlock& last = blocks[i - 2];
                products.add_values(i - 2, last.count, last.fade, seen.values + last.first * width);
            }
            if (i >= 1 && i <= count) weigh(i - 1, step, seen);
        }
    }

    // The blocks of rows of which any sees any key of a step.
    int64_t find_blocks(KeyRange step) {
        const int64_t length = keys.length(tile.sequence);
        int64_t found = 0;
        for (int64_t r = 0; r < rows; r += BLOCK) {
            const int64_t count = rows - r < BLOCK ? rows - r : BLOCK, first = position(r), last = position(r + count - 1);
            if (!step.meets(hooks.seen_by_any(first, last, length))) continue;
            const bool is_whole = step.stop - step.first == KEYS && hooks.seen_by_all(first, last, length).holds(step);
            blocks[found++] = {r, count, is_whole, Floats{}};
        }
        return found;
    }

    // Scores become weights under the new maxima.
    void weigh(int64_t number, KeyRange step, Seen seen) {
        RowBlock& block = blocks[number];
        alignas(64) float shift[BLOCK], fade[BLOCK];
        Floats top[BLOCK];
        for (int64_t i = 0; i < BLOCK; ++i)
            top[i] = i >= block.count ? lanes(-INFINITY)
                     : modifies || !block.is_whole ? score_row(number, i, step) : largest_score(number, i);
        const Floats before = load(seen.maximum + block.first, Block{0});
        const Floats now = larger(largest_of_rows(top) * factor, before);
        block.fade = power(before - shift_of(now));
        store(seen.maximum + block.first, Block{0}, now);
        store(shift, Block{0}, shift_of(now));
        store(fade, Block{0}, block.fade);
        for (int64_t i = 0; i < block.count; ++i) {
            float* total = seen.total + (block.first + i) * LANES;
            store(total, Block{0}, fma(load(total, Block{0}), lanes(fade[i]), weigh_row(number, i, shift[i])));
        }
    }

    Floats largest_score(int64_t number, int64_t i) const {
        const float* row = products.scores_of(number) + i * KEYS;
        Floats top = load(row, Block{0});
        for (int v = LANES; v < KEYS; v += LANES) top = larger(load(row, Block{v}), top);
        return top;
    }

    // Products become scores, of keys that the row sees.
    Floats score_row(int64_t number, int64_t i, KeyRange step) const {
        const int32_t m = (int32_t)position(blocks[number].first + i), h = (int32_t)head(blocks[number].first + i);
        float* row = products.scores_of(number) + i * KEYS;
        Floats top = lanes(-INFINITY);
        for (int v = 0; v < KEYS; v += LANES) {
            const Ints n = LANE_NUMBERS + (int32_t)(step.first + v);
            Floats score = load(row, Block{v});
            if (modifies) {
                score *= call.scale;
                if (call.slopes) score += call.slopes[h] * __builtin_convertvector(n - m, Floats);
                score = hooks.score_mod(score, m, n, h);
            }
            const Ints is_seen = hooks.mask_mod(m, n, h) & (n < (int32_t)step.stop);
            score = is_seen ? score : lanes(-INFINITY);
            store(row, Block{v}, score);
            top = larger(score, top);
        }
        return top;
    }

    // Scores become weights; the result is their sums by lane.
    Floats weigh_row(int64_t number, int64_t i, float shift) {
        const float* row = products.scores_of(number) + i * KEYS;
        Floats sum = {};
        for (int v = 0; v < KEYS; v += 2 * LANES) {
            const Floats weight = power(fma(load(row, Block{v}), lanes(factor), lanes(-shift)));
            const Floats next = power(fma(load(row, Block{v + LANES}), lanes(factor), lanes(-shift)));
            sum += weight + next;
            products.put_weights(number, i, v, weight, next);
        }
        return sum;
    }
};

}  // namespace sage
