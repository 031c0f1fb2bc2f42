// Microkernel of coded weights (coded.h) in integers for blocks of more rows, with AVX512_VNNI.
//
// The integers of x and the sums are those of microkernel_integers.h, bit for bit, so that the result of a row does not
// depend on which of the two computes it. Here codes are unpacked to words of 16 bits in scratch memory, once for all
// rows of a block, and `vpdpwssd` multiplies pairs of words: a sum needs one register, where bytes of x need two.
// A block goes through K in parts, whose codes, scales and offsets stay in the L1 cache while all tiles of up to 6 rows
// pass; meanwhile each tile prefetches some lines of the next part.
#pragma once

#include "microkernel_integers.h"

#if defined(__AVX512VNNI__)
namespace sage {
namespace integers {
namespace words {

constexpr int64_t BLOCK_ROWS = 64, ROWS = 6, PANELS = 4;  // of a block and of a tile
constexpr int64_t PART = 4;                               // steps of DEPTH inputs
static_assert(BLOCK_ROWS * PANELS * PANEL <= MAX_SUMS, "a block has at most MAX_SUMS sums");

// The codes of a step without their center: inputs 0 and 2, and 1 and 3, of each four; scales, and offsets if there are
// any, of up to two groups.
struct alignas(64) Step {
    int32_t codes[DEPTH / 2][PANELS][PANEL];
    float scales[2][PANELS][PANEL], offsets[2][PANELS][PANEL];
};

// A step of a panel.
template <class Weight>
inline void unpack_codes(Step& out, const char* step, int64_t panel, int32_t center) {
    const __m512i low = _mm512_set1_epi32(0x00ff00ff), centers = _mm512_set1_epi16((int16_t)center);
#pragma GCC unroll 8
    for (int64_t part = 0; part < 8; ++part) {
        const __m512i codes = part_of<Weight>(step, part);
        const __m512i even = _mm512_and_si512(codes, low), odd = _mm512_srli_epi16(codes, 8);
        _mm512_store_si512(out.codes[2 * part][panel], _mm512_sub_epi16(even, centers));
        _mm512_store_si512(out.codes[2 * part + 1][panel], _mm512_sub_epi16(odd, centers));
    }
}

// Scales and offsets of a group, as number `half` of a step.
inline void unpack_group(Step& out, const CodedPanel& w, int64_t panel, int64_t half, int64_t group) {
    const CodedHeader& header = *w.header;
    const __m512 scale = (__m512)w.scales<Floats>(group * PANEL);
    _mm512_store_ps(out.scales[half][panel], scale);
    if (header.minima)
        _mm512_store_ps(out.offsets[half][panel], (__m512)w.minima<Floats>(group * PANEL));
    else if (header.zeros)
        _mm512_store_ps(out.offsets[half][panel], _mm512_mul_ps((__m512)w.zeros<Floats>(group * PANEL), scale));
}

// Not the intrinsic, for which GCC 13 keeps sums in memory.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, __m512i x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}

// Half `half` of a step, or all of it: integers of some rows times codes of some panels, scaled and added to the totals
// of the rows, [PANELS][PANEL] each.
template <int ROWS, int PANELS, bool IS_WHOLE>
__attribute__((noinline)) void add_step(float* const* totals, const Integers* const* x, const Step& step, int64_t half,
                                        bool has_offset) {
    constexpr int64_t PAIRS = IS_WHOLE ? DEPTH / 2 : DEPTH / 4;
    __m512i sum[ROWS][PANELS] = {};
    const int64_t first = half * (DEPTH / 4);
#pragma GCC unroll 1
    for (int64_t pair = first; pair < first + PAIRS; ++pair) {
        __m512i codes[PANELS];
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) codes[p] = _mm512_load_si512(step.codes[pair][p]);
#pragma GCC unroll 8
        for (int64_t row = 0; row < ROWS; ++row) {
            const __m512i two = four_bytes(x[row]->bytes + 4 * pair);
#pragma GCC unroll 4
            for (int64_t p = 0; p < PANELS; ++p) add_products(sum[row][p], codes[p], two);
        }
    }
#pragma GCC unroll 8
    for (int64_t row = 0; row < ROWS; ++row) {
        const __m512 x_scale = _mm512_set1_ps(x[row]->scale);
        float* at = totals[row];
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p)
            _mm512_store_ps(at + p * PANEL,
                            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[row][p]),
                                            _mm512_mul_ps(_mm512_load_ps(step.scales[half][p]), x_scale),
                                            _mm512_load_ps(at + p * PANEL)));
    }
    if (__builtin_expect(has_offset, 0))
        for (int64_t row = 0; row < ROWS; ++row) {
            const __m512 x_sum = _mm512_set1_ps((float)sum_of<IS_WHOLE>(*x[row], half) * x[row]->scale);
            float* at = totals[row];
#pragma GCC unroll 4
            for (int64_t p = 0; p < PANELS; ++p)
                _mm512_store_ps(at + p * PANEL, _mm512_fnmadd_ps(_mm512_load_ps(step.offsets[half][p]), x_sum,
                                                                 _mm512_load_ps(at + p * PANEL)));
        }
}

// Lines of the next part, some of which each step of a tile prefetches.
struct Ahead {
    const char *from, *end;        // of the panel whose turn it is
    int64_t bytes, to_next, left;  // of a panel, from its end to the next one, and the number of those

    void prefetch(int64_t lines) {
        for (; lines > 0; --lines, from += 64) {
            if (from == end) {
                if (!left) return;
                --left;
                from += to_next;
                end += to_next + bytes;
            }
            __builtin_prefetch(from, 0, 3);
        }
    }
};

template <class Weight>
struct Blocks {
    using Function = void (*)(float* const*, const Integers* const*, const Step&, int64_t, bool);

    template <bool IS_WHOLE, size_t... I>
    static Function at(int64_t index, std::index_sequence<I...>) {
        static constexpr Function table[] = {add_step<I / PANELS + 1, I % PANELS + 1, IS_WHOLE>...};
        return table[index];
    }
    static Function of(int64_t rows, int64_t panels, bool is_whole) {
        constexpr auto numbers = std::make_index_sequence<ROWS * PANELS>{};
        const int64_t index = (rows - 1) * PANELS + panels - 1;
        return is_whole ? at<true>(index, numbers) : at<false>(index, numbers);
    }

    // A step of the rows of a tile, and what rounding took of those with a rest. `x` is the block of the first row.
    static void add_rows(float* sums, const XBlock* x, int64_t stride, int64_t rows, int64_t panels, const Step& step,
                         int64_t half, bool is_whole, bool has_offset) {
        float *totals[ROWS], *rest_totals[ROWS];
        const Integers *values[ROWS], *rest[ROWS];
        int64_t num_rest = 0;
        for (int64_t row = 0; row < rows; ++row) {
            const XBlock& block = x[row * stride];
            totals[row] = rest_totals[num_rest] = sums + row * panels * PANEL;
            values[row] = &block.whole;
            rest[num_rest] = &block.rest;
            num_rest += block.whole.has_rest;
        }
        of(rows, panels, is_whole)(totals, values, step, half, has_offset);
        if (num_rest) of(num_rest, panels, is_whole)(rest_totals, rest, step, half, has_offset);
    }

    static void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, CodedPanel w,
                      int64_t panels) {
        Step steps[PART];
        const CodedHeader& header = *w.header;
        const int64_t blocks = round_up(K, DEPTH) / DEPTH, tiles = (rows + ROWS - 1) / ROWS;
        const int64_t center = header.minima ? 0 : Weight::CENTER, step_bytes = Weight::LINES * 64;
        const bool is_whole = header.group >= DEPTH, has_offset = header.zeros;
        const XBlock* x = (const XBlock*)prepared + first * blocks;
        memset(sums, 0, rows * panels * PANEL * sizeof(float));
        for (int64_t begin = 0; begin < blocks; begin += PART) {
            const int64_t count = minimum(PART, blocks - begin), after = begin + count;
            for (int64_t p = 0; p < panels; ++p) {
                const CodedPanel panel = w.next(p);
                for (int64_t b = 0; b < count; ++b) {
                    unpack_codes<Weight>(steps[b], panel.codes() + (begin + b) * step_bytes, p, (int32_t)center);
                    for (int64_t half = 0; half < (is_whole ? 1 : 2); ++half)
                        unpack_group(steps[b], panel, p, half, ((begin + b) * DEPTH + half * 16) / header.group);
                }
            }
            const char* next = after < blocks ? w.codes() + after * step_bytes : w.next(panels).codes();
            const int64_t bytes = PART * step_bytes;
            Ahead ahead = {next, next + bytes, bytes, header.panel_bytes - bytes, panels - 1};
            const int64_t each = (bytes / 64 * panels + tiles * count - 1) / (tiles * count);
            for (int64_t t = 0; t < tiles; ++t) {
                const Range range = split_range(rows, 1, t, tiles);
                for (int64_t b = 0; b < count; ++b) {
                    ahead.prefetch(each);
                    for (int64_t half = 0; half < (is_whole ? 1 : 2); ++half)
                        add_rows(sums + range.first * panels * PANEL, x + range.first * blocks + begin + b, blocks,
                                 range.count(), panels, steps[b], half, is_whole, has_offset);
                }
            }
        }
    }
};

}  // namespace words

// Few rows are prepared as bytes, and multiplied in blocks of up to 4 rows by 2 panels, or of 2 rows by 4 panels: the
// registers have room for both sums of 8. A GEMM splits its rows evenly, so that a block has few rows only if all
// prepared rows are few.
constexpr int64_t FEW_ROWS = 15;

template <class Element>
inline void prepare_rows(void* prepared, const Element* const* x, int64_t rows, int64_t K) {
    return rows <= FEW_ROWS ? prepare<false>(prepared, x, rows, K) : prepare<true>(prepared, x, rows, K);
}

template <class Weight>
inline void any_block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, CodedPanel w,
                      int64_t panels, Prefetch prefetch) {
    if (rows > 4) return words::Blocks<Weight>::block(sums, prepared, first, rows, K, w, panels);
    Blocks<Weight, 4, 4>::block(sums, prepared, first, rows, K, w, panels, prefetch);
}

template <class Element, class Weight>
constexpr Microkernel<Element, Weight> MICROKERNEL = {
    {{2, 2, 4}, {FEW_ROWS, 4, 2}, {ANY_ROWS, words::BLOCK_ROWS, words::PANELS}},
    1,
    X_BYTES,
    do_nothing,
    do_nothing,
    prepare_rows<Element>,
    any_block<Weight>,
    "AVX512_VNNI"};

}  // namespace integers
}  // namespace sage
#endif
