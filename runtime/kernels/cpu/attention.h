// Softmax attention over keys that lie anywhere: paged or side by side, one query row per sequence or thousands.
//
// The query heads of one key head, times some query positions, are the rows of a tile. A tile goes over its keys 64 at a
// time with a running maximum (Milakov & Gimelshein 2018; Dao et al. 2022), 1024 at a time as a part of its own; the parts
// are merged in order. A row's arithmetic depends on its position and its keys alone: not on the rows beside it, on how a
// prompt was cut into chunks, nor on the number of threads.
#pragma once

#include "attention_products.h"

namespace sage {

constexpr int64_t PART = 1024;    // keys of one part, which may be another thread's
constexpr int64_t TILE_ROWS = 96; // query rows that share packed keys and values

// Keys first <= n < stop, what a mask leaves over of a sequence.
struct KeyRange {
    int64_t first;
    int64_t stop;
};

// The op's own part of attention: what becomes of a score, which pairs count, and which keys that leaves.
template <class Score, class Mask, class Range>
struct AttentionHooks {
    Score score_mod;
    Mask mask_mod;
    Range range;
};
template <class Score, class Mask, class Range>
AttentionHooks(Score, Mask, Range) -> AttentionHooks<Score, Mask, Range>;

// e^x for x <= 0. What would be subnormal is 0: masked keys are such, and a processor takes long over subnormals.
inline Floats weight_of(Floats x) { return x < -87.0f ? Floats{} : exp(maximum(x, -87.0f)); }

// What a tile has seen of its keys: per row the maximum, the sum of exponentials, and the weighted sum of values.
struct Seen {
    float* maximum;
    float* total;
    float* values;  // [rows, width]

    void clear(int64_t rows, int64_t width) {
        for (int64_t r = 0; r < rounded_up(rows, LANES); ++r) maximum[r] = -INFINITY, total[r] = 0;
        memset(values, 0, (size_t)(rows * width) * sizeof(float));
    }

    void merge(const Seen& later, int64_t rows, int64_t width) {
        for (int64_t r = 0; r < rows; ++r) {
            float top = sage::maximum(maximum[r], later.maximum[r]);
            if (top == -INFINITY) continue;
            float mine = exp(maximum[r] - top), theirs = exp(later.maximum[r] - top);
            maximum[r] = top;
            total[r] = total[r] * mine + later.total[r] * theirs;
            for (int64_t at = 0; at < width; at += LANES) {
                Floats sum = load(values + r * width, Block{at}) * mine + load(later.values + r * width, Block{at}) * theirs;
                store(values + r * width, Block{at}, sum);
            }
        }
    }

    static int64_t floats(int64_t rows, int64_t width) { return 2 * rounded_up(rows, LANES) + rows * width; }
    static Seen at(float* memory, int64_t rows) {
        return {memory, memory + rounded_up(rows, LANES), memory + 2 * rounded_up(rows, LANES)};
    }
};

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
};

struct AttentionTile {
    int64_t sequence, key_head, position, positions;  // positions of the sequence's query rows
};

// One tile's keys from `range.first` to `range.stop`, at most a part. Memory is laid out in the order of use.
template <class E, class Keys, class Hooks>
class TileWorker {
   public:
    TileWorker(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks, const AttentionTile& tile)
        : call(call), keys(keys), hooks(hooks), tile(tile), group(call.query_heads / call.key_heads),
          rows(tile.positions * group), width(rounded_up(call.value_width, LANES)),
          products(rows, call.key_width, call.value_width) {
        largest = scratch<float>(1, 3 * rounded_up(rows, LANES));
        shift = largest + rounded_up(rows, LANES);
        fade = shift + rounded_up(rows, LANES);
        const E** row = scratch<const E*>(0, rows);
        for (int64_t r = 0; r < rows; ++r)
            row[r] = call.q + keys.row(tile.sequence, position(r)) * call.q_row + head(r) * call.q_head;
        products.take_queries(row);
    }

    void see(KeyRange range, Seen seen) {
        seen.clear(rows, width);
        for (int64_t first = range.first / KEYS * KEYS; first < range.stop; first += KEYS) {
            int64_t skipped = range.first > first ? range.first - first : 0;
            int64_t count = range.stop - first < KEYS ? range.stop - first : KEYS;
            const E *key[KEYS] = {}, *value[KEYS] = {};
            keys.find_keys(tile.sequence, tile.key_head, first + skipped, first + count, key + skipped);
            keys.find_values(tile.sequence, tile.key_head, first + skipped, first + count, value + skipped);
            fetch_rows(value + skipped, count - skipped, call.value_width);
            products.multiply_keys(key);
            weigh(first, count, seen);
            products.add_values(value, seen.values);
        }
    }

    // Divides by the sums, to which a sink adds its exponential, and rounds; a row that saw no key is 0.
    void finish(Seen seen) {
        for (int64_t r = 0; r < rows; ++r) {
            E* row = call.o + keys.row(tile.sequence, position(r)) * call.o_row + head(r) * call.o_head;
            float factor = seen.total[r] == 0.0f ? 0.0f : 1.0f / total(r, seen);
            sweep(call.value_width, [&](auto i) { store(row, i, to<E>(load(seen.values + r * width, i) * factor)); });
        }
    }

    int64_t num_rows() const { return rows; }

   private:
    const AttentionCall<E>& call;
    const Keys& keys;
    const Hooks& hooks;
    const AttentionTile& tile;
    int64_t group, rows, width;
    TileProducts<E> products;
    float *largest, *shift, *fade;  // of each row, in this step

    int64_t position(int64_t r) const { return tile.position + r / group; }
    int64_t head(int64_t r) const { return tile.key_head * group + r % group; }

    float total(int64_t r, Seen seen) const {
        if (!call.sinks) return seen.total[r];
        float sink = value(call.sinks[head(r)]);
        return seen.total[r] + exp(sink - seen.maximum[r]);
    }

    // Products become exponentials under the new maxima; what was seen before fades to them. Each step goes over all rows
    // before the next one does, as the steps of one row wait for each other.
    void weigh(int64_t first, int64_t count, Seen seen) {
        for (int64_t r = 0; r < rows; ++r) largest[r] = score_row(r, first, count);
        for (int64_t r = 0; r < rows; r += LANES) {
            Floats before = load(seen.maximum + r, Block{0}), now = maximum(before, load(largest + r, Block{0}));
            Floats from = now == -INFINITY ? Floats{} : now;  // a row that sees nothing yet: e^-inf is 0
            store(seen.maximum + r, Block{0}, now);
            store(shift + r, Block{0}, from);
            store(fade + r, Block{0}, weight_of(before - from));
        }
        for (int64_t r = 0; r < rows; ++r) seen.total[r] = seen.total[r] * fade[r] + weigh_row(r);
        for (int64_t r = 0; r < rows; ++r)
            if (fade[r] != 1.0f)
                for (int64_t at = 0; at < width; at += LANES)
                    store(seen.values + r * width, Block{at}, load(seen.values + r * width, Block{at}) * fade[r]);
    }

    float score_row(int64_t r, int64_t first, int64_t count) {
        const int32_t m = (int32_t)keys.position(tile.sequence, position(r)), h = (int32_t)head(r);
        const int32_t stop = (int32_t)(first + count);
        float* row = products.scores + r * KEYS;
        Floats top = lanes(-INFINITY);
        for (int v = 0; v < KEYS; v += LANES) {
            Ints n = LANE_NUMBERS + (int32_t)(first + v);
            Floats product = load(row, Block{v}) * call.scale;
            if (call.slopes) product += call.slopes[h] * __builtin_convertvector(n - m, Floats);
            Ints is_seen = hooks.mask_mod(m, n, h) & (n < stop);
            Floats score = is_seen ? hooks.score_mod(product, m, n, h) : lanes(-INFINITY);
            store(row, Block{v}, score);
            top = maximum(top, score);
        }
        return largest_lane(top);
    }

    float weigh_row(int64_t r) {
        float* row = products.scores + r * KEYS;
        Floats sum = {};
        for (int v = 0; v < KEYS; v += LANES) {
            Floats weight = weight_of(load(row, Block{v}) - shift[r]);
            sum += weight;
            products.put_weight(r, v, weight);
        }
        return sum_of_lanes(sum);
    }
};

// The keys that any row of a tile sees.
template <class Keys, class Hooks>
inline KeyRange tile_range(const Keys& keys, const Hooks& hooks, const AttentionTile& tile) {
    int64_t first = keys.position(tile.sequence, tile.position), length = keys.length(tile.sequence);
    return hooks.range(first, first + tile.positions - 1, length);
}

inline KeyRange part_of(KeyRange range, int64_t start) {
    int64_t stop = start + PART;
    return {start > range.first ? start : range.first, stop < range.stop ? stop : range.stop};
}

// All sequences. Where there are few tiles, the parts of their keys are shared out between threads instead.
template <class E, class Keys, class Hooks>
inline void attend(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks) {
    const int64_t group = call.query_heads / call.key_heads;
    const int64_t positions = TILE_ROWS / group > 1 ? TILE_ROWS / group : 1;
    int64_t num_tiles = 0;
    for (int64_t b = 0; b < call.sequences; ++b)
        num_tiles += (keys.queries(b) + positions - 1) / positions * call.key_heads;
    AttentionTile* tiles = scratch<AttentionTile>(1, num_tiles + 1);
    int64_t at = 0, most_parts = 1, work = 0;
    for (int64_t b = 0; b < call.sequences; ++b)
        for (int64_t start = 0; start < keys.queries(b); start += positions)
            for (int64_t g = 0; g < call.key_heads; ++g) {
                int64_t left = keys.queries(b) - start;
                tiles[at] = {b, g, start, left < positions ? left : positions};
                KeyRange range = tile_range(keys, hooks, tiles[at]);
                int64_t parts = (range.stop + PART - 1) / PART;
                most_parts = parts > most_parts ? parts : most_parts;
                work += tiles[at++].positions * group * (range.stop - range.first) * call.key_width;
            }
    const int64_t width = rounded_up(call.value_width, LANES), rows = positions * group;
    const int64_t floats = Seen::floats(rows, width);
    const int64_t threads = sage_num_threads();
    if (threads == 1 || most_parts == 1 || num_tiles >= 4 * threads) {
        const auto compute = [&](int64_t t) {
            TileWorker<E, Keys, Hooks> worker(call, keys, hooks, tiles[t]);
            float* memory = scratch<float>(2, 2 * floats);
            Seen all = Seen::at(memory, rows), part = Seen::at(memory + floats, rows);
            all.clear(worker.num_rows(), width);
            KeyRange range = tile_range(keys, hooks, tiles[t]);
            for (int64_t start = range.first / PART * PART; start < range.stop; start += PART) {
                worker.see(part_of(range, start), part);
                all.merge(part, worker.num_rows(), width);
            }
            worker.finish(all);
        };
        if (work >= PARALLEL_WORK) return each_part(num_tiles, compute);
        for (int64_t t = 0; t < num_tiles; ++t) compute(t);
        return;
    }
    float* memory = scratch<float>(3, num_tiles * most_parts * floats);
    each_part(num_tiles * most_parts, [&](int64_t part) {
        const int64_t t = part / most_parts;
        KeyRange range = part_of(tile_range(keys, hooks, tiles[t]), part % most_parts * PART);
        if (range.first >= range.stop) return;
        TileWorker<E, Keys, Hooks> worker(call, keys, hooks, tiles[t]);
        worker.see(range, Seen::at(memory + part * floats, rows));
    });
    each_part(num_tiles, [&](int64_t t) {
        TileWorker<E, Keys, Hooks> worker(call, keys, hooks, tiles[t]);
        Seen all = Seen::at(scratch<float>(2, floats), rows);
        all.clear(worker.num_rows(), width);
        for (int64_t p = 0; p < most_parts; ++p) {
            KeyRange range = part_of(tile_range(keys, hooks, tiles[t]), p * PART);
            if (range.first < range.stop)
                all.merge(Seen::at(memory + (t * most_parts + p) * floats, rows), worker.num_rows(), width);
        }
        worker.finish(all);
    });
}

// Where keys, values and query rows lie.

// In a paged cache: a sequence's query rows are its last positions.
template <class E>
struct PagedKeys {
    const E* k;
    int64_t k_page, k_slot, k_head;
    const E* v;
    int64_t v_page, v_slot, v_head;
    const int32_t* block_table;
    int64_t table_row, block_size;
    const int32_t* seq_lens;
    const int32_t* q_start;  // null where every sequence has one row

    int64_t length(int64_t b) const { return seq_lens[b]; }
    int64_t queries(int64_t b) const { return q_start ? q_start[b + 1] - q_start[b] : 1; }
    int64_t row(int64_t b, int64_t i) const { return q_start ? q_start[b] + i : b; }
    int64_t position(int64_t b, int64_t i) const { return length(b) - queries(b) + i; }
    void find_keys(int64_t b, int64_t g, int64_t first, int64_t stop, const E** rows) const {
        find(k + g * k_head, k_page, k_slot, b, first, stop, rows);
    }
    void find_values(int64_t b, int64_t g, int64_t first, int64_t stop, const E** rows) const {
        find(v + g * v_head, v_page, v_slot, b, first, stop, rows);
    }
    void find(
        const E* cache, int64_t page, int64_t slot, int64_t b, int64_t first, int64_t stop, const E** rows) const {
        const int32_t* blocks = block_table + b * table_row;
        for (int64_t n = first; n < stop;) {
            int64_t offset = n % block_size, rest = block_size - offset;
            const E* row = cache + blocks[n / block_size] * page + offset * slot;
            for (int64_t run = stop - n < rest ? stop - n : rest; run > 0; --run, ++n, row += slot) *rows++ = row;
        }
    }
};

// Side by side: the keys of a sequence are the rows of its queries.
template <class E>
struct OwnKeys {
    const E* k;
    int64_t k_row, k_head;
    const E* v;
    int64_t v_row, v_head;
    const int32_t* q_start;

    int64_t length(int64_t b) const { return q_start[b + 1] - q_start[b]; }
    int64_t queries(int64_t b) const { return length(b); }
    int64_t row(int64_t b, int64_t i) const { return q_start[b] + i; }
    int64_t position(int64_t, int64_t i) const { return i; }
    void find_keys(int64_t b, int64_t g, int64_t first, int64_t stop, const E** rows) const {
        for (int64_t n = first; n < stop; ++n) *rows++ = k + row(b, n) * k_row + g * k_head;
    }
    void find_values(int64_t b, int64_t g, int64_t first, int64_t stop, const E** rows) const {
        for (int64_t n = first; n < stop; ++n) *rows++ = v + row(b, n) * v_row + g * v_head;
    }
};

}  // namespace sage
