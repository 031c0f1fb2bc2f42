// Softmax attention over keys in any layout, paged or contiguous, for one query row per sequence or thousands.
//
// The query heads of one key head, times some query positions, are the rows of a tile (attention_tile.h). The keys of a
// tile are split into parts of 1024, and the softmax states of the parts are merged in order. The arithmetic of a row
// depends on its position and its keys alone: not on other rows, on the chunks of its prompt, or on the thread count.
#pragma once

#include "attention_tile.h"

namespace sage {

constexpr int64_t KEYS_PER_PART = 1024;  // a part may be computed by another thread
// More rows share the packed keys and values of a step, but fewer tiles leave threads without work, and the state of
// more rows leaves the L2 cache.
constexpr int64_t MIN_TILE_ROWS = 128, MAX_TILE_ROWS = 512;

// The tiles of a call, and the amount of work.
struct AttentionTiles {
    AttentionTile* tile;
    int64_t count, max_rows, max_parts, work;  // max_rows, max_parts: the largest numbers of rows and parts of a tile
};

inline KeyRange part_of(KeyRange range, int64_t start) {
    int64_t stop = start + KEYS_PER_PART;
    return {start > range.first ? start : range.first, stop < range.stop ? stop : range.stop};
}

// The number of positions of a tile: whole blocks of rows, and several tiles per thread.
template <class E, class Keys>
inline int64_t positions_per_tile(const AttentionCall<E>& call, const Keys& keys, int64_t threads) {
    int64_t rows = 0;
    for (int64_t b = 0; b < call.sequences; ++b) rows += keys.queries(b) * call.query_heads;
    rows = minimum(MAX_TILE_ROWS, maximum(MIN_TILE_ROWS, rows / (8 * threads)));
    return maximum((int64_t)BLOCK, rows / call.group() / BLOCK * BLOCK);
}

// Splits a call into tiles. The last positions of a prompt come first: they see the most keys, and a long tile at the
// end would leave the other threads idle.
template <class E, class Keys, class Hooks>
inline AttentionTiles split_tiles(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks,
                                  int64_t positions) {
    int64_t count = 0;
    for (int64_t b = 0; b < call.sequences; ++b)
        count += round_up(keys.queries(b), positions) / positions * call.key_heads;
    AttentionTiles tiles = {scratch<AttentionTile>(Scratch::ATTENTION_TILES, count + 1), 0, 1, 1, 0};
    for (int64_t b = 0; b < call.sequences; ++b)
        for (int64_t start = round_up(keys.queries(b), positions) - positions; start >= 0; start -= positions)
            for (int64_t g = 0; g < call.key_heads; ++g) {
                const AttentionTile tile = {b, g, start, minimum(keys.queries(b) - start, positions)};
                const KeyRange range = tile_range(keys, hooks, tile);
                tiles.tile[tiles.count++] = tile;
                tiles.max_rows = maximum(tiles.max_rows, tile.positions * call.group());
                tiles.max_parts = maximum(tiles.max_parts, (range.stop + KEYS_PER_PART - 1) / KEYS_PER_PART);
                tiles.work += tile.positions * call.group() * (range.stop - range.first) * call.key_width;
            }
    return tiles;
}

// Parallel over tiles: a thread computes some tiles one after another, and all parts of each. While it computes its
// last one, it prefetches the first rows of the range of tiles that it takes next if all threads take turns.
template <class Gemms, class E, class Keys, class Hooks>
inline void attend_tiles(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks,
                         const AttentionTiles& tiles) {
    const int64_t width = round_up(call.value_width, LANES), floats = SoftmaxState::floats(tiles.max_rows, width);
    const auto attend_tile = [&](int64_t t, int64_t next_tile) {
        TileWorker<Gemms, E, Keys, Hooks> worker(call, keys, hooks, tiles.tile[t]);
        float* memory = scratch<float>(Scratch::ATTENTION_STATES, 2 * floats);
        SoftmaxState state = SoftmaxState::at(memory, tiles.max_rows);
        SoftmaxState part = SoftmaxState::at(memory + floats, tiles.max_rows);
        const KeyRange range = tile_range(keys, hooks, tiles.tile[t]);
        const int64_t first = range.first / KEYS_PER_PART * KEYS_PER_PART;
        for (int64_t start = first; start == first || start < range.stop; start += KEYS_PER_PART) {
            const bool is_last = start + KEYS_PER_PART >= range.stop;
            const AttentionTile& next = tiles.tile[is_last ? next_tile : t];
            const KeyRange next_range = !is_last         ? part_of(range, start + KEYS_PER_PART)
                                        : next_tile == t ? KeyRange{0, 0}
                                                         : tile_range(keys, hooks, next);
            worker.attend_range(part_of(range, start), start == first ? state : part, next, next_range);
            if (start != first) state.merge(part, worker.num_rows(), width);
        }
        worker.store_rows(state);
    };
    const int64_t threads = tiles.work < PARALLEL_WORK ? 1 : sage_num_threads();
    const int64_t parts = threads == 1 ? 1 : minimum(tiles.count, 8 * threads);
    parallel_for(parts, [&](int64_t i) {
        const Range range = split_range(tiles.count, 1, i, parts);
        const int64_t last = range.last - 1;
        const int64_t after = i + threads < parts ? split_range(tiles.count, 1, i + threads, parts).first : last;
        for (int64_t t = range.first; t < range.last; ++t) attend_tile(t, t < last ? t + 1 : after);
    });
}

// Parallel over parts, for few tiles with many keys: all parts are computed first, then merged tile by tile in order.
template <class Gemms, class E, class Keys, class Hooks>
inline void attend_parts(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks,
                         const AttentionTiles& tiles) {
    const int64_t width = round_up(call.value_width, LANES), floats = SoftmaxState::floats(tiles.max_rows, width);
    float* memory = scratch<float>(Scratch::PART_STATES, tiles.count * tiles.max_parts * floats);
    const auto state_of = [&](int64_t t, int64_t p) {
        return SoftmaxState::at(memory + (t * tiles.max_parts + p) * floats, tiles.max_rows);
    };
    parallel_for(tiles.count * tiles.max_parts, [&](int64_t i) {
        const int64_t t = i / tiles.max_parts, p = i % tiles.max_parts;
        const AttentionTile& tile = tiles.tile[t];
        const KeyRange range = part_of(tile_range(keys, hooks, tile), p * KEYS_PER_PART);
        if (range.first >= range.stop) return state_of(t, p).reset(tile.positions * call.group(), width);
        TileWorker<Gemms, E, Keys, Hooks> worker(call, keys, hooks, tile);
        worker.attend_range(range, state_of(t, p), tile, KeyRange{0, 0});
    });
    parallel_for(tiles.count, [&](int64_t t) {
        TileWorker<Gemms, E, Keys, Hooks> worker(call, keys, hooks, tiles.tile[t]);
        for (int64_t p = 1; p < tiles.max_parts; ++p) state_of(t, 0).merge(state_of(t, p), worker.num_rows(), width);
        worker.store_rows(state_of(t, 0));
    });
}

template <class Gemms, class E, class Keys, class Hooks>
inline void attend_with(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks) {
    const int64_t threads = sage_num_threads();
    const AttentionTiles tiles = split_tiles(call, keys, hooks, positions_per_tile(call, keys, threads));
    if (threads == 1 || tiles.max_parts == 1 || tiles.count >= 4 * threads)
        attend_tiles<Gemms>(call, keys, hooks, tiles);
    else
        attend_parts<Gemms>(call, keys, hooks, tiles);
}

// Attention of all sequences of a call.
template <class E, class Keys, class Hooks>
inline void attend(const AttentionCall<E>& call, const Keys& keys, const Hooks& hooks) {
#if defined(__AVX512BF16__)
    static const bool uses_pairs = allows("amx") || allows("avx512_bf16");
    if constexpr (std::is_same_v<E, bf16>)
        if (uses_pairs) return attend_with<PairGemms>(call, keys, hooks);
#endif
    attend_with<FloatGemms<E>>(call, keys, hooks);
}

}  // namespace sage
