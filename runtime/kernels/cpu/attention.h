// Softmax attention over keys that lie anywhere: paged or side by side, one query row per sequence or thousands.
//
// The query heads of one key head, times some query positions, are the rows of a tile. A tile goes over its keys 64 at a
// time with a running maximum (Milakov & Gimelshein 2018; Dao et al. 2022), 1024 at a time as a part of its own; the parts
// are merged in order. A row's arithmetic depends on its position and its keys alone: not on the rows beside it, on how a
// prompt was cut into chunks, nor on the number of threads.
#pragma once

#include "loops.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sage {

constexpr int KEYS = 64;          // keys of one step: four vectors of scores
constexpr int64_t PART = 1024;    // keys of one part, which may be another thread's
constexpr int64_t TILE_ROWS = 96; // query rows that share packed keys and values

inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Keys first <= n < stop, what a mask leaves over of a sequence.
struct KeyRange {
    int64_t first;
    int64_t stop;
};

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

template <class Element>
inline Floats load_some(const Element* row, int64_t at, int64_t length) {
    return at + LANES <= length ? load(row, Block{at}) : load(row, Tail{at, length - at});
}

// The op's own part of attention: what becomes of a score, which pairs count, and which keys that leaves.
template <class Score, class Mask, class Range>
struct AttentionHooks {
    Score score_mod;
    Mask mask_mod;
    Range range;
};
template <class Score, class Mask, class Range>
AttentionHooks(Score, Mask, Range) -> AttentionHooks<Score, Mask, Range>;

// What a tile has seen of its keys: per row the maximum, the sum of exponentials, and the weighted sum of values.
struct Seen {
    float* maximum;
    float* total;
    float* values;  // [rows, width]

    void clear(int64_t rows, int64_t width) {
        for (int64_t r = 0; r < rows; ++r) maximum[r] = -INFINITY, total[r] = 0;
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

    static int64_t floats(int64_t rows, int64_t width) { return rounded_up(2 * rows, LANES) + rows * width; }
    static Seen at(float* memory, int64_t rows, int64_t width) {
        return {memory, memory + rows, memory + rounded_up(2 * rows, LANES)};
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
          rows(tile.positions * group), depth(rounded_up(call.key_width, LANES)),
          width(rounded_up(call.value_width, LANES)) {
        float* memory = scratch<float>(0, rows * depth + depth * KEYS + KEYS * width + rows * KEYS);
        queries = memory;
        packed_keys = queries + rows * depth;
        packed_values = packed_keys + depth * KEYS;
        scores = packed_values + KEYS * width;
        pack_queries();
    }

    void see(KeyRange range, Seen seen) {
        seen.clear(rows, width);
        for (int64_t first = range.first / KEYS * KEYS; first < range.stop; first += KEYS) {
            int64_t skipped = range.first > first ? range.first - first : 0;
            int64_t count = range.stop - first < KEYS ? range.stop - first : KEYS;
            pack_keys(first, skipped, count);
            multiply(queries, depth, packed_keys, KEYS, scores, KEYS, rows, KEYS, call.key_width, false);
            for (int64_t r = 0; r < rows; ++r) weigh(r, first, count, seen);
            pack_values(first, skipped, count);
            multiply(scores, KEYS, packed_values, width, seen.values, width, rows, width, count, true);
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
    int64_t row_width() const { return width; }

   private:
    const AttentionCall<E>& call;
    const Keys& keys;
    const Hooks& hooks;
    const AttentionTile& tile;
    int64_t group, rows, depth, width;
    float *queries, *packed_keys, *packed_values, *scores;

    int64_t position(int64_t r) const { return tile.position + r / group; }
    int64_t head(int64_t r) const { return tile.key_head * group + r % group; }

    float total(int64_t r, Seen seen) const {
        if (!call.sinks) return seen.total[r];
        float sink = value(call.sinks[head(r)]);
        return seen.total[r] + exp(sink - seen.maximum[r]);
    }

    void pack_queries() {
        for (int64_t r = 0; r < rows; ++r) {
            const E* row = call.q + keys.row(tile.sequence, position(r)) * call.q_row + head(r) * call.q_head;
            for (int64_t at = 0; at < depth; at += LANES)
                store(queries + r * depth, Block{at}, load_some(row, at, call.key_width));
        }
    }

    // [depth, KEYS], so that a step of the product reads scores of 64 keys; keys that are not there are 0
    void pack_keys(int64_t first, int64_t skipped, int64_t count) {
        const E* rows_of_keys[KEYS] = {};
        keys.find_keys(tile.sequence, tile.key_head, first + skipped, first + count, rows_of_keys + skipped);
        for (int64_t key = 0; key < KEYS; key += LANES) {
            const E* const* row = rows_of_keys + key;
            for (int64_t at = 0; at < call.key_width; at += LANES) {
                Floats block[LANES];
                for (int lane = 0; lane < LANES; ++lane)
                    block[lane] = row[lane] ? load_some(row[lane], at, call.key_width) : Floats{};
                transpose(block);
                for (int d = 0; d < LANES; ++d) store(packed_keys + (at + d) * KEYS, Block{key}, block[d]);
            }
        }
    }

    void pack_values(int64_t first, int64_t skipped, int64_t count) {
        memset(packed_values, 0, (size_t)(skipped * width) * sizeof(float));
        const E* row[KEYS];
        keys.find_values(tile.sequence, tile.key_head, first + skipped, first + count, row + skipped);
        for (int64_t key = skipped; key < count; ++key)
            for (int64_t at = 0; at < width; at += LANES)
                store(packed_values + key * width, Block{at}, load_some(row[key], at, call.value_width));
    }

    // A row of products becomes exponentials under the new maximum; what was seen before is scaled to it
    void weigh(int64_t r, int64_t first, int64_t count, Seen seen) {
        const int32_t m = (int32_t)keys.position(tile.sequence, position(r)), h = (int32_t)head(r);
        float* row = scores + r * KEYS;
        Floats score[KEYS / LANES], top = lanes(-INFINITY);
        for (int v = 0; v < KEYS / LANES; ++v) {
            Ints n = LANE_NUMBERS + (int32_t)(first + v * LANES);
            Floats product = load(row, Block{v * LANES}) * call.scale;
            if (call.slopes) product += call.slopes[h] * __builtin_convertvector(n - m, Floats);
            Ints is_seen = hooks.mask_mod(m, n, h) & (n < (int32_t)(first + count));
            score[v] = is_seen ? hooks.score_mod(product, m, n, h) : lanes(-INFINITY);
            top = maximum(top, score[v]);
        }
        Max largest;
        largest.add(top, Block{0});
        float before = seen.maximum[r], now = maximum(before, largest.total());
        float shift = now == -INFINITY ? 0.0f : now;  // a row that sees nothing yet: e^-inf is 0
        Sum sum;
        for (int v = 0; v < KEYS / LANES; ++v) {
            Floats weight = exp(score[v] - shift);
            sum.add(weight, Block{0});
            store(row, Block{v * LANES}, weight);
        }
        float fade = exp(before - shift);
        seen.maximum[r] = now;
        seen.total[r] = seen.total[r] * fade + sum.total();
        if (fade != 1.0f)
            for (int64_t at = 0; at < width; at += LANES)
                store(seen.values + r * width, Block{at}, load(seen.values + r * width, Block{at}) * fade);
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
#ifdef _OPENMP
    const int64_t threads = omp_get_max_threads();
#else
    const int64_t threads = 1;
#endif
    if (threads == 1 || most_parts == 1 || num_tiles >= 4 * threads) {
#pragma omp parallel for schedule(dynamic) if (num_tiles > 1 && work >= PARALLEL_WORK)
        for (int64_t t = 0; t < num_tiles; ++t) {
            TileWorker<E, Keys, Hooks> worker(call, keys, hooks, tiles[t]);
            float* memory = scratch<float>(2, 2 * floats);
            Seen all = Seen::at(memory, rows, width), part = Seen::at(memory + floats, rows, width);
            all.clear(worker.num_rows(), width);
            KeyRange range = tile_range(keys, hooks, tiles[t]);
            for (int64_t start = range.first / PART * PART; start < range.stop; start += PART) {
                worker.see(part_of(range, start), part);
                all.merge(part, worker.num_rows(), width);
            }
            worker.finish(all);
        }
        return;
    }
    float* memory = scratch<float>(3, num_tiles * most_parts * floats);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t t = 0; t < num_tiles; ++t)
        for (int64_t p = 0; p < most_parts; ++p) {
            KeyRange range = part_of(tile_range(keys, hooks, tiles[t]), p * PART);
            if (range.first >= range.stop) continue;
            TileWorker<E, Keys, Hooks> worker(call, keys, hooks, tiles[t]);
            worker.see(range, Seen::at(memory + (t * most_parts + p) * floats, rows, width));
        }
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < num_tiles; ++t) {
        TileWorker<E, Keys, Hooks> worker(call, keys, hooks, tiles[t]);
        Seen all = Seen::at(scratch<float>(2, floats), rows, width);
        all.clear(worker.num_rows(), width);
        for (int64_t p = 0; p < most_parts; ++p) {
            KeyRange range = part_of(tile_range(keys, hooks, tiles[t]), p * PART);
            if (range.first < range.stop)
                all.merge(Seen::at(memory + (t * most_parts + p) * floats, rows, width), worker.num_rows(), width);
        }
        worker.finish(all);
    }
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
