// Softmax attention over keys that lie anywhere: paged or side by side, one query row per sequence or thousands.
//
// The query heads of one key head, times some query positions, are the rows of a tile. A tile goes over its keys 64 at a
// time, which it packs once for all of its rows (Dao et al. 2022), and 1024 at a time as a part of its own; the parts are
// merged in order. A row's arithmetic depends on its position and its keys alone: not on the rows beside it, on how a
// prompt was cut into chunks, nor on the number of threads.
#pragma once

#include "attention_keys.h"
#include "attention_pairs.h"
#include "attention_products.h"
#include "attention_seen.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sage {

constexpr int64_t PART = 1024;      // keys of one part, which may be another thread's
constexpr int64_t TILE_ROWS = 256;  // query rows that share packed keys and values

// Keys first <= n < stop, what a mask leaves over of a sequence.
struct KeyRange {
    int64_t first;
    int64_t stop;

    bool meets(KeyRange other) const { return first < other.stop && other.first < stop; }
    bool holds(KeyRange other) const { return first <= other.first && other.stop <= stop; }
};

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

// Up to 64 keys and values from a multiple of 64 on. Rows that are not seen are rows of zeros.
template <class E>
struct KeyStep {
    KeyRange range;
    const E* key[KEYS];
    const E* value[KEYS];

    template <class Keys>
    void find(const Keys& keys, const AttentionTile& tile, KeyRange seen, int64_t first, const E* zeros) {
        range = {first, minimum(first + KEYS, seen.stop)};
        const int64_t from = maximum(seen.first - first, (int64_t)0), to = range.stop - first;
        keys.find(tile.sequence, tile.key_head, first + from, first + to, key + from, value + from);
        for (int64_t n = 0; n < from; ++n) key[n] = value[n] = zeros;
        for (int64_t n = to; n < KEYS; ++n) key[n] = value[n] = zeros;
    }
};

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

    void see(KeyRange range, Seen seen) {
        seen.clear(rows, width);
        if (range.first >= range.stop) return;
        int64_t first = range.first / KEYS * KEYS;
        KeyStep<E> steps[2], *step = steps, *next = steps + 1;
        step->find(keys, tile, range, first, zeros);
        for (; first < range.stop; first += KEYS) {
            const bool is_last = first + KEYS >= range.stop;
            if (!is_last) next->find(keys, tile, range, first + KEYS, zeros);
            if (!is_last) fetch_rows(next->key, call.key_width);
            products.take_keys(step->key);
            if (!is_last) fetch_rows(next->value, call.value_width);
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

    // All rows see the keys of a step. While vectors weigh a block, tiles multiply the keys of the next one and the values
    // of the last one: the two take turns, so that the processor has both at hand.
    void see_step(KeyRange step, Seen seen) {
        const int64_t count = find_blocks(step);
        for (int64_t i = 0; i < count + 2; ++i) {
            const auto multiply = [&](int quarter) {
                const RowBlock& next = blocks[i];
                const RowBlock& last = blocks[i - 2];
                if (quarter % 2 == 0 && i >= 2)
                    products.add_values(i - 2, quarter / 2, last.count, last.fade, seen.values + last.first * width);
                if (quarter % 2 == 1 && i < count) products.multiply_keys(i, quarter / 2, next.first, next.count);
            };
            if (i >= 1 && i <= count)
                weigh(i - 1, step, seen, multiply);
            else
                for (int quarter = 0; quarter < 4; ++quarter) multiply(quarter);
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
    template <class Meanwhile>
    void weigh(int64_t number, KeyRange step, Seen seen, Meanwhile&& meanwhile) {
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
        for (int64_t i = 0; i < BLOCK; ++i) {
            if (i % (BLOCK / 4) == 0) meanwhile((int)(i / (BLOCK / 4)));
            if (i >= block.count) continue;
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

// The tiles of a call, and how much there is to do.
struct AttentionTiles {
    AttentionTile* tile;
    int64_t count, rows, most_parts, work;  // rows and parts: at most, of one tile
};

// The keys that any row of a tile sees.
template <class Keys, class Hooks>
inline KeyRange tile_range(const Keys& keys, const Hooks& hooks, const AttentionTile& tile) {
    int64_t first = keys.position(tile.sequence, tile.position), length = keys.length(tile.sequence);
    return hooks.seen_by_any(first, first + tile.positions - 1, length);
}

inline KeyRange part_of(KeyRange range, int64_t start) {
    int64_t stop = start + PART;
    return {start > range.first ? start : range.first, stop < range.stop ? stop : range.stop};
}

// Tiles of whole blocks of rows, as far as a sequence has them; the last positions of a prompt, which see most, come first.
template <class E, class Keys, class Hooks>
inline AttentionTiles cut_tiles(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks) {
    const int64_t fitting = TILE_ROWS / call.group() / BLOCK * BLOCK, positions = fitting > BLOCK ? fitting : BLOCK;
    int64_t count = 0;
    for (int64_t b = 0; b < call.sequences; ++b)
        count += (keys.queries(b) + positions - 1) / positions * call.key_heads;
    AttentionTiles tiles = {scratch<AttentionTile>(4, count + 1), 0, 1, 1, 0};
    for (int64_t b = 0; b < call.sequences; ++b)
        for (int64_t start = round_up(keys.queries(b), positions) - positions; start >= 0; start -= positions)
            for (int64_t g = 0; g < call.key_heads; ++g) {
                const AttentionTile tile = {b, g, start, minimum(keys.queries(b) - start, positions)};
                const KeyRange range = tile_range(keys, hooks, tile);
                tiles.tile[tiles.count++] = tile;
                tiles.rows = maximum(tiles.rows, tile.positions * call.group());
                tiles.most_parts = maximum(tiles.most_parts, (range.stop + PART - 1) / PART);
                tiles.work += tile.positions * call.group() * (range.stop - range.first) * call.key_width;
            }
    return tiles;
}

// A thread takes one tile after the other, and goes over its parts.
template <class Products, class E, class Keys, class Hooks>
inline void attend_tiles(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks, const AttentionTiles& tiles) {
    const int64_t width = round_up(call.value_width, LANES), floats = Seen::floats(tiles.rows, width);
#pragma omp parallel for schedule(dynamic) if (tiles.count > 1 && tiles.work >= PARALLEL_WORK)
    for (int64_t t = 0; t < tiles.count; ++t) {
        TileWorker<Products, E, Keys, Hooks> worker(call, keys, hooks, tiles.tile[t]);
        float* memory = scratch<float>(2, 2 * floats);
        Seen all = Seen::at(memory, tiles.rows), part = Seen::at(memory + floats, tiles.rows);
        const KeyRange range = tile_range(keys, hooks, tiles.tile[t]);
        int64_t start = range.first / PART * PART;
        worker.see(part_of(range, start), all);
        while ((start += PART) < range.stop) {
            worker.see(part_of(range, start), part);
            all.merge(part, worker.num_rows(), width);
        }
        worker.finish(all);
    }
}

// Threads share out the parts of few tiles, and merge them afterwards.
template <class Products, class E, class Keys, class Hooks>
inline void attend_parts(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks, const AttentionTiles& tiles) {
    const int64_t width = round_up(call.value_width, LANES), floats = Seen::floats(tiles.rows, width);
    float* memory = scratch<float>(3, tiles.count * tiles.most_parts * floats);
    const auto seen_by = [&](int64_t t, int64_t p) {
        return Seen::at(memory + (t * tiles.most_parts + p) * floats, tiles.rows);
    };
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t t = 0; t < tiles.count; ++t)
        for (int64_t p = 0; p < tiles.most_parts; ++p) {
            const KeyRange range = part_of(tile_range(keys, hooks, tiles.tile[t]), p * PART);
            TileWorker<Products, E, Keys, Hooks>(call, keys, hooks, tiles.tile[t]).see(range, seen_by(t, p));
        }
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tiles.count; ++t) {
        TileWorker<Products, E, Keys, Hooks> worker(call, keys, hooks, tiles.tile[t]);
        for (int64_t p = 1; p < tiles.most_parts; ++p) seen_by(t, 0).merge(seen_by(t, p), worker.num_rows(), width);
        worker.finish(seen_by(t, 0));
    }
}

// All sequences, by some products.
template <class Products, class E, class Keys, class Hooks>
inline void attend_by(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks) {
#ifdef _OPENMP
    const int64_t threads = omp_get_max_threads();
#else
    const int64_t threads = 1;
#endif
    const AttentionTiles tiles = cut_tiles(call, keys, hooks);
    if (threads == 1 || tiles.most_parts == 1 || tiles.count >= 4 * threads)
        attend_tiles<Products>(call, keys, hooks, tiles);
    else
        attend_parts<Products>(call, keys, hooks, tiles);
}

template <class E, class Keys, class Hooks>
inline void attend(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<E, bf16>)
        if (allows("amx") || allows("pairs")) return attend_by<PairProducts>(call, keys, hooks);
#endif
    attend_by<FloatProducts<E>>(call, keys, hooks);
}

}  // namespace sage
