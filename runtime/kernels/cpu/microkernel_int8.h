// Microkernel of coded weights (coded.h) and activations of 8 bits (int8_rows.h), with AVX512_VNNI.
//
// A product takes one `vpdpbusd`, where activations of 15 bits take two. Sums of 32 inputs are integers, those of up to
// CHUNK inputs of a group are added in float32 with the scales of x, and then multiplied by the scale of the weight.
// Few rows read a weight as it is in memory. Blocks of more rows go through K in parts of CHUNK inputs, whose
// codes and scales are unpacked once to scratch memory in the L1 cache.
#pragma once

#include "int8_rows.h"
#include "microkernel_words.h"

#if defined(__AVX512VNNI__)
namespace sage {
namespace int8 {

using X = int8_rows::Block<int8_t>;
using int8_rows::CHUNK;

constexpr int64_t BLOCK_ROWS = 64, ROWS = 3, PANELS = 4;  // of a block and of a tile
constexpr int64_t FEW_BLOCK_ROWS = 4;                     // of a block that reads a weight as it is in memory
// Of a GEMM in such blocks. Each reads the weight again, which costs more for bytes.
template <class Weight>
constexpr int64_t FEW_ROWS = Weight::LINES == 8 ? 4 : 8;
constexpr int64_t MAX_PIECES = CHUNK / 16;
static_assert(BLOCK_ROWS * PANELS * PANEL <= MAX_SUMS, "a block has at most MAX_SUMS sums");

// Inputs with equal scales of the weight: some steps of DEPTH, one step, or half of one.
enum class Piece { LONG, STEP, HALF };

inline Piece piece_of(const CodedHeader& header) {
    return header.group < DEPTH ? Piece::HALF : header.group == DEPTH ? Piece::STEP : Piece::LONG;
}

// Not the intrinsic, for which GCC 13 keeps sums in memory.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}

// Integer sums of the products of a step, or of a half of one. `codes(part, panel)` are those of four inputs.
template <int ROWS, int PANELS, bool IS_WHOLE, class Codes>
inline __attribute__((always_inline)) void add_step(__m512i (&sum)[ROWS][PANELS], const X* x, int64_t stride,
                                                    int64_t half, __m512i center, Codes&& codes) {
    constexpr int64_t PARTS = IS_WHOLE ? 8 : 4;
    const int64_t which = IS_WHOLE ? 2 : half;
#pragma GCC unroll 8
    for (int64_t row = 0; row < ROWS; ++row) {
        const __m512i start =
            _mm512_and_si512(integers::four_bytes((const int8_t*)&x[row * stride].starts[which]), center);
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) sum[row][p] = start;
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < PARTS; ++i) {
        const int64_t part = IS_WHOLE ? i : half * PARTS + i;
        __m512i own[PANELS];
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) own[p] = codes(part, p);
#pragma GCC unroll 8
        for (int64_t row = 0; row < ROWS; ++row) {
            const __m512i four = integers::four_bytes(x[row * stride].codes + 4 * part);
#pragma GCC unroll 4
            for (int64_t p = 0; p < PANELS; ++p) add_products(sum[row][p], own[p], four);
        }
    }
}

// Adds the integer sums of a step times the scales of x.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_scaled(__m512 (&total)[ROWS][PANELS], const __m512i (&sum)[ROWS][PANELS],
                                                      const X* x, int64_t stride) {
#pragma GCC unroll 8
    for (int64_t row = 0; row < ROWS; ++row) {
        const __m512 scale = _mm512_set1_ps(x[row * stride].scale);
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p)
            total[row][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[row][p]), scale, total[row][p]);
    }
}

// The scales of a piece, and what is subtracted for each unit of the sum of x.
struct Group {
    __m512 scale[PANELS], offset[PANELS];
};

inline __m512 offset_of(const CodedPanel& w, __m512 scale, int64_t at) {
    return w.header->minima ? (__m512)w.minima<Floats>(at) : _mm512_mul_ps((__m512)w.zeros<Floats>(at), scale);
}

inline void read_group(Group& out, const CodedPanel& w, int64_t panels, int64_t at) {
    for (int64_t p = 0; p < panels; ++p) {
        const CodedPanel of = w.next(p);
        out.scale[p] = (__m512)of.scales<Floats>(at);
        if (w.header->zeros) out.offset[p] = offset_of(of, out.scale[p], at);
    }
}

// CHUNK inputs of some panels, or less: pieces of `steps` steps each, or of a step, or of a half of one.
struct Part {
    const char* codes;  // of a panel of bytes, each `panel` after the one before, or null: `unpacked`
    int64_t panel;
    int64_t pieces, steps;
    int32_t center;  // -1, or 0 without one
    Group groups[MAX_PIECES];
    __m512i unpacked[CHUNK / DEPTH][8][PANELS];  // of four inputs each
};

// Adds the products of some rows of x and some panels to sums[ROWS][PANELS][PANEL].
template <int ROWS, int PANELS, Piece PIECE, bool HAS_OFFSET, bool ARE_BYTES>
__attribute__((noinline)) void add_tile(float* sums, const X* x, int64_t stride, const Part& part) {
    const char* bytes = part.codes;
    const __m512i(*unpacked)[8][int8::PANELS] = part.unpacked;
    const int64_t panel = part.panel;
    const __m512i center = _mm512_set1_epi32(part.center);
    const auto codes_at = [&](int64_t i, int64_t p) {
        return ARE_BYTES ? _mm512_loadu_si512(bytes + i * 64 + p * panel) : (*unpacked)[i][p];
    };
    const auto add_group = [&](const Group& group, int64_t row, int64_t p, __m512 value, float x_sum) {
        float* to = sums + (row * PANELS + p) * PANEL;
        __m512 total = _mm512_fmadd_ps(value, group.scale[p], _mm512_load_ps(to));
        if constexpr (HAS_OFFSET) total = _mm512_fnmadd_ps(group.offset[p], _mm512_set1_ps(x_sum), total);
        _mm512_store_ps(to, total);
    };
    __m512i sum[ROWS][PANELS];
    if constexpr (PIECE == Piece::LONG) {
        __m512 total[ROWS][PANELS] = {};
        float x_sums[ROWS] = {};
        for (int64_t s = 0; s < part.steps; ++s, ++x, ++unpacked, bytes += 8 * 64) {
            add_step<ROWS, PANELS, true>(sum, x, stride, 2, center, codes_at);
            add_scaled(total, sum, x, stride);
            for (int64_t row = 0; HAS_OFFSET && row < ROWS; ++row) x_sums[row] += x[row * stride].sums[2];
        }
#pragma GCC unroll 4
        for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int64_t p = 0; p < PANELS; ++p) add_group(part.groups[0], row, p, total[row][p], x_sums[row]);
        return;
    }
    for (int64_t i = 0; i < part.pieces; ++i) {
        const int64_t which = PIECE == Piece::HALF ? i % 2 : 2;
        add_step<ROWS, PANELS, PIECE == Piece::STEP>(sum, x, stride, which, center, codes_at);
#pragma GCC unroll 4
        for (int64_t row = 0; row < ROWS; ++row) {
            const X& of = x[row * stride];
            const __m512 scale = _mm512_set1_ps(of.scale);
#pragma GCC unroll 4
            for (int64_t p = 0; p < PANELS; ++p)
                add_group(part.groups[i], row, p, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[row][p]), scale),
                          of.sums[which]);
        }
        if (PIECE == Piece::STEP || which) ++x, ++unpacked, bytes += 8 * 64;
    }
}

using Tile = void (*)(float*, const X*, int64_t, const Part&);

template <Piece PIECE, bool HAS_OFFSET, bool ARE_BYTES, size_t... I>
inline Tile tile_at(int64_t index, std::index_sequence<I...>) {
    static constexpr Tile table[] = {add_tile<I / PANELS + 1, I % PANELS + 1, PIECE, HAS_OFFSET, ARE_BYTES>...};
    return table[index];
}
template <Piece PIECE, bool ARE_BYTES>
inline Tile tile_of(int64_t rows, int64_t panels, bool has_offset) {
    constexpr auto numbers = std::make_index_sequence<ROWS * PANELS>{};
    const int64_t index = (rows - 1) * PANELS + panels - 1;
    return has_offset ? tile_at<PIECE, true, ARE_BYTES>(index, numbers)
                      : tile_at<PIECE, false, ARE_BYTES>(index, numbers);
}
template <bool ARE_BYTES>
inline Tile tile_of(int64_t rows, int64_t panels, Piece piece, bool has_offset) {
    switch (piece) {
        case Piece::LONG: return tile_of<Piece::LONG, ARE_BYTES>(rows, panels, has_offset);
        case Piece::STEP: return tile_of<Piece::STEP, ARE_BYTES>(rows, panels, has_offset);
        default: return tile_of<Piece::HALF, ARE_BYTES>(rows, panels, has_offset);
    }
}

template <class Weight>
inline void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, CodedPanel w,
                  int64_t panels) {
    constexpr bool ARE_BYTES = Weight::LINES == 8;
    constexpr int64_t STEP_BYTES = Weight::LINES * 64;
    const CodedHeader& header = *w.header;
    const int64_t padded = round_up(K, DEPTH), blocks = padded / DEPTH, tiles = (rows + ROWS - 1) / ROWS;
    const X* x = (const X*)prepared + first * blocks;
    const char *own = w.codes(), *next = w.next(panels).codes() - blocks * STEP_BYTES;
    const Piece piece = piece_of(header);
    Part part;
    part.panel = header.panel_bytes;
    part.center = header.minima ? 0 : -1;
    memset(sums, 0, rows * panels * PANEL * sizeof(float));
    for (int64_t k = 0, count = 0; k < padded; k += count) {
        count = piece == Piece::LONG ? int8_rows::num_inputs(k, padded, header.group) : minimum(CHUNK, padded - k);
        part.pieces = piece == Piece::LONG ? 1 : count / header.group;
        part.steps = count / DEPTH;
        for (int64_t i = 0; i < part.pieces; ++i) read_group(part.groups[i], w, panels, (k / header.group + i) * PANEL);
        const int64_t step = k / DEPTH, after = step + part.steps, bytes = part.steps * STEP_BYTES;
        const char* from = own + step * STEP_BYTES;
        part.codes = from;
        for (int64_t p = 0; p < panels && !ARE_BYTES; ++p)
            for (int64_t i = 0; i < part.steps; ++i)
#pragma GCC unroll 8
                for (int64_t four = 0; four < 8; ++four)
                    part.unpacked[i][four][p] =
                        integers::part_of<Weight>(from + p * header.panel_bytes + i * STEP_BYTES, four);
        const char* ahead_of = (after < blocks ? own : next) + after * STEP_BYTES;
        integers::words::Ahead ahead = {ahead_of, ahead_of + bytes, bytes, header.panel_bytes - bytes, panels - 1};
        const int64_t each = (bytes / 64 * panels + tiles - 1) / tiles;
        for (int64_t t = 0; t < tiles; ++t) {
            const Range range = split_range(rows, 1, t, tiles);
            ahead.prefetch(each);
            tile_of<ARE_BYTES>(range.count(), panels, piece, header.zeros)(
                sums + range.first * panels * PANEL, x + range.first * blocks + step, blocks, part);
        }
    }
}

// Few rows and some panels, all inputs.
template <class Weight, int ROWS, int PANELS, Piece PIECE>
inline __attribute__((always_inline)) void add_few_rows(float* sums, const X* x, int64_t K, const CodedPanel& w) {
    constexpr int64_t STEP_BYTES = Weight::LINES * 64;
    const CodedHeader header = *w.header;
    const int64_t blocks = K / DEPTH, panel = header.panel_bytes, group = header.group;
    const bool has_offset = header.zeros;
    const __m512i center = _mm512_set1_epi32(header.minima ? 0 : -1);
    const char *own = w.codes(), *next = w.next(PANELS).codes() - blocks * STEP_BYTES;
    __m512 total[ROWS][PANELS] = {};
    for (int64_t k = 0, count = 0; k < K; k += count) {
        count = PIECE == Piece::HALF ? 16 : PIECE == Piece::STEP ? DEPTH : int8_rows::num_inputs(k, K, group);
        const int64_t which = PIECE == Piece::HALF ? k / 16 % 2 : 2, steps = PIECE == Piece::LONG ? count / DEPTH : 1;
        __m512 values[ROWS][PANELS] = {};
        float x_sums[ROWS] = {};
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t b = k / DEPTH + s, after = b + integers::AHEAD_BYTES / STEP_BYTES;
            const char *codes = own + b * STEP_BYTES, *ahead = (after < blocks ? own : next) + after * STEP_BYTES;
            __m512i sum[ROWS][PANELS];
            add_step<ROWS, PANELS, PIECE != Piece::HALF>(
                sum, x + b, blocks, which, center, [&](int64_t i, int64_t p) __attribute__((always_inline)) {
                    if (i * Weight::LINES % 8 < Weight::LINES)
                        __builtin_prefetch(ahead + i * Weight::LINES / 8 * 64 + p * panel, 0, 3);
                    return integers::part_of<Weight>(codes + p * panel, i);
                });
            add_scaled(values, sum, x + b, blocks);
            for (int64_t row = 0; row < ROWS; ++row) x_sums[row] += x[row * blocks + b].sums[which];
        }
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) {
            const CodedPanel of = w.next(p);
            const __m512 scale = (__m512)of.scales<Floats>(k / group * PANEL);
#pragma GCC unroll 2
            for (int64_t row = 0; row < ROWS; ++row)
                total[row][p] = _mm512_fmadd_ps(values[row][p], scale, total[row][p]);
            if (!has_offset) continue;
            const __m512 offset = offset_of(of, scale, k / group * PANEL);
            for (int64_t row = 0; row < ROWS; ++row)
                total[row][p] = _mm512_fnmadd_ps(offset, _mm512_set1_ps(x_sums[row]), total[row][p]);
        }
    }
    memcpy(sums, total, sizeof total);
}

template <class Weight, int ROWS, int PANELS>
__attribute__((noinline)) void few_rows(float* sums, const X* x, int64_t K, const CodedPanel& w) {
    switch (piece_of(*w.header)) {
        case Piece::LONG: return add_few_rows<Weight, ROWS, PANELS, Piece::LONG>(sums, x, K, w);
        case Piece::STEP: return add_few_rows<Weight, ROWS, PANELS, Piece::STEP>(sums, x, K, w);
        default: return add_few_rows<Weight, ROWS, PANELS, Piece::HALF>(sums, x, K, w);
    }
}

using FewRows = void (*)(float*, const X*, int64_t, const CodedPanel&);

template <class Weight, int ROWS, int PANELS>
constexpr FewRows few_rows_function() {
    if constexpr (ROWS <= 2 || PANELS <= 2) return few_rows<Weight, ROWS, PANELS>;
    return nullptr;
}
template <class Weight, size_t... I>
inline FewRows few_rows_at(int64_t index, std::index_sequence<I...>) {
    static constexpr FewRows table[] = {few_rows_function<Weight, I / PANELS + 1, I % PANELS + 1>()...};
    return table[index];
}

// A GEMM splits its rows evenly, so that a block has few rows only if all prepared rows are few.
template <class Weight>
inline void any_block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, CodedPanel w,
                      int64_t panels, Prefetch) {
    if (rows > FEW_BLOCK_ROWS) return block<Weight>(sums, prepared, first, rows, K, w, panels);
    const int64_t padded = round_up(K, DEPTH), index = (rows - 1) * PANELS + panels - 1;
    few_rows_at<Weight>(index, std::make_index_sequence<FEW_BLOCK_ROWS * PANELS>{})(
        sums, (const X*)prepared + first * padded / DEPTH, padded, w);
}

template <class Element, class Weight>
constexpr Microkernel<Element, Weight> MICROKERNEL = {
    {{2, 2, 4}, {FEW_ROWS<Weight>, FEW_BLOCK_ROWS, 2}, {ANY_ROWS, BLOCK_ROWS, PANELS}},
    1,
    int8_rows::BYTES<int8_t>,
    do_nothing,
    do_nothing,
    int8_rows::prepare<Weight, int8_t, Element>,
    any_block<Weight>,
    "AVX512_VNNI"};

}  // namespace int8
}  // namespace sage
#endif
