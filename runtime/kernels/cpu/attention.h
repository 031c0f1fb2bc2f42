// Softmax attention over keys that lie anywhere: paged or side by side, one query row per sequence or thousands.
//
// The query heads of one key head, times some query positions, are the rows of a tile (attention_tile.h). A tile goes over
// its keys 1024 at a time as a part of its own; the parts are merged in order. A row's arithmetic depends on its position
// and its keys alone: not on the rows beside it, on how a prompt was cut into chunks, nor on the number of threads.
#pragma once

#include "attention_tile.h"

namespace sage {

constexpr int64_t PART = 1024;  // keys of one part, which may be another thread's
constexpr int64_t FEWEST_ROWS = 128, MOST_ROWS = 512;  // of a tile: they share packed keys and values

// The tiles of a call, and how much there is to do.
struct AttentionTiles {
    AttentionTile* tile;
    int64_t count, rows, most_parts, work;  // rows and parts: at most, of one tile
};

inline KeyRange part_of(KeyRange range, int64_t start) {
    int64_t stop = start + PART;
    return {start > range.first ? start : range.first, stop < range.stop ? stop : range.stop};
}

// Positions of a tile: whole blocks of rows, and several tiles for each thread.
template <class E, class Keys>
inline int64_t positions_of_tiles(const AttentionCall<E>& call, const Keys& keys, int64_t threads) {
    int64_t rows = 0;
    for (int64_t b = 0; b < call.sequences; ++b) rows += keys.queries(b) * call.query_heads;
    rows = minimum(MOST_ROWS, maximum(FEWEST_ROWS, rows / (8 * threads)));
    return maximum((int64_t)BLOCK, rows / call.group() / BLOCK * BLOCK);
}

// The last positions of a prompt come first, as they see most.
template <class E, class Keys, class Hooks>
inline AttentionTiles cut_tiles(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks, int64_t positions) {
    int64_t count = 0;
    for (int64_t b = 0; b < call.sequences; ++b)
        count += round_up(keys.queries(b), positions) / positions * call.key_heads;
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

// A thread takes some tiles one after the other, and goes over the parts of each.
template <class Products, class E, class Keys, class Hooks>
inline void attend_tiles(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks, const AttentionTiles& tiles) {
    const int64_t width = round_up(call.value_width, LANES), floats = Seen::floats(tiles.rows, width);
    const auto attend_tile = [&](int64_t t, int64_t following) {
        TileWorker<Products, E, Keys, Hooks> worker(call, keys, hooks, tiles.tile[t]);
        float* memory = scratch<float>(2, 2 * floats);
        Seen all = Seen::at(memory, tiles.rows), part = Seen::at(memory + floats, tiles.rows);
        const KeyRange range = tile_range(keys, hooks, tiles.tile[t]);
        const int64_t first = range.first / PART * PART;
        for (int64_t start = first; start == first || start < range.stop; start += PART) {
            const bool is_last = start + PART >= range.stop;
            const AttentionTile& next = tiles.tile[is_last ? following : t];
            const KeyRange next_range = !is_last         ? part_of(range, start + PART)
                                        : following == t ? KeyRange{0, 0}
                                                         : tile_range(keys, hooks, next);
            worker.see(part_of(range, start), start == first ? all : part, next, next_range);
            if (start != first) all.merge(part, worker.num_rows(), width);
        }
        worker.finish(all);
    };
    const int64_t threads = tiles.work < PARALLEL_WORK ? 1 : sage_num_threads();
    const int64_t parts = threads == 1 ? 1 : minimum(tiles.count, 8 * threads);
    each_part(parts, [&](int64_t i) {
        const Range own = share(tiles.count, 1, i, parts);
        for (int64_t t = own.first; t < own.last; ++t) attend_tile(t, minimum(t + 1, own.last - 1));
    });
}

// Threads share out the parts of few tiles, and merge them afterwards.
template <class Products, class E, class Keys, class Hooks>
inline void attend_parts(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks, const AttentionTiles& tiles) {
    const int64_t width = round_up(call.value_width, LANES), floats = Seen::floats(tiles.rows, width);
    float* memory = scratch<float>(3, tiles.count * tiles.most_parts * floats);
    const auto seen_by = [&](int64_t t, int64_t p) {
        return Seen::at(memory + (t * tiles.most_parts + p) * floats, tiles.rows);
    };
    each_part(tiles.count * tiles.most_parts, [&](int64_t i) {
        const int64_t t = i / tiles.most_parts, p = i % tiles.most_parts;
        const AttentionTile& tile = tiles.tile[t];
        const KeyRange range = part_of(tile_range(keys, hooks, tile), p * PART);
        if (range.first >= range.stop) return seen_by(t, p).clear(tile.positions * call.group(), width);
        TileWorker<Products, E, Keys, Hooks> worker(call, keys, hooks, tile);
        worker.see(range, seen_by(t, p), tile, KeyRange{0, 0});
    });
    each_part(tiles.count, [&](int64_t t) {
        TileWorker<Products, E, Keys, Hooks> worker(call, keys, hooks, tiles.tile[t]);
        for (int64_t p = 1; p < tiles.most_parts; ++p) seen_by(t, 0).merge(seen_by(t, p), worker.num_rows(), width);
        worker.finish(seen_by(t, 0));
    });
}

template <class Products, class E, class Keys, class Hooks>
inline void attend_by(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks) {
    const int64_t threads = sage_num_threads();
    const AttentionTiles tiles = cut_tiles(call, keys, hooks, positions_of_tiles(call, keys, threads));
    if (threads == 1 || tiles.most_parts == 1 || tiles.count >= 4 * threads)
        attend_tiles<Products>(call, keys, hooks, tiles);
    else
        attend_parts<Products>(call, keys, hooks, tiles);
}

// All sequences.
template <class E, class Keys, class Hooks>
inline void attend(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks) {
#if defined(__AVX512BF16__)
    static const bool takes_pairs = allows("amx") || allows("pairs");
    if constexpr (std::is_same_v<E, bf16>)
        if (takes_pairs) return attend_by<PairProducts>(call, keys, hooks);
#endif
    attend_by<FloatProducts<E>>(call, keys, hooks);
}

}  // namespace sage
