// Microkernel of coded weights (coded.h) and activations of 8 bits (int8_rows.h) in float32, for processors without
// AVX512_VNNI.
//
// Codes of both are widened to floats. A sum of 32 products is below 2^24, and therefore exact, so that results are
// those of microkernel_int8.h, bit for bit, where multiply-adds round once.
#pragma once

#include "int8_rows.h"
#include "microkernel_widened.h"

namespace sage {
namespace int8_widened {

using int8_rows::CHUNK;
using vectors::broadcast;
using vectors::multiply_add;
using vectors::Reg;
using vectors::RegBits;
using vectors::WIDTH;
using widened::BLOCK_ROWS;
using widened::PANELS;
using widened::ROWS;

using X = int8_rows::Block<float>;
constexpr int64_t PARTS = PANEL / WIDTH;  // registers of a panel

// Some inputs of a group: codes without their center, [PANELS][count][PANEL], and their scales and offsets.
struct Piece {
    float codes[PANELS * CHUNK * PANEL];
    float scales[PANELS * PANEL], offsets[PANELS * PANEL];
    int64_t count, first;  // of inputs, and the position of the first one in its step
    bool has_offset;
};

template <class Weight>
inline void widen(Piece& out, const CodedPanel& w, int64_t p, int64_t k) {
    const CodedHeader& header = *w.header;
    const CodedPanel panel = w.next(p);
    const Reg center = Reg{} + (header.minima ? 0.0f : (float)Weight::CENTER);
    for (int64_t r = 0; r < PARTS; ++r) {
        const int64_t at = k / header.group * PANEL + r * WIDTH;
        const Reg scale = panel.scales<Reg>(at);
        const Reg offset = header.minima ? panel.minima<Reg>(at) : panel.zeros<Reg>(at) * scale;
        memcpy(out.scales + p * PANEL + r * WIDTH, &scale, sizeof scale);
        memcpy(out.offsets + p * PANEL + r * WIDTH, &offset, sizeof offset);
    }
    for (int64_t part = k / 4; part < (k + out.count) / 4; ++part)
        for (int64_t r = 0; r < PARTS; ++r) {
            const char* step = panel.codes() + part / 8 * Weight::LINES * 64;
            const RegBits words = read_part<Weight, RegBits>(step, part % 8, r * WIDTH);
            for (int64_t i = 0; i < 4; ++i) {
                const Reg value = widen_codes<Weight, Reg>(words >> (uint32_t)(8 * i) & 0xffu) - center;
                memcpy(out.codes + (p * CHUNK + part * 4 - k + i) * PANEL + r * WIDTH, &value, sizeof value);
            }
        }
}

// Adds the products of some rows of x and a piece to sums[ROWS][PANELS][PANEL].
template <int ROWS, int PANELS>
void add_tile(float* sums, const X* x, int64_t stride, const Piece& piece) {
    constexpr int64_t REGS = PANELS * PARTS;
    const int64_t step = piece.count < DEPTH ? piece.count : DEPTH;
    const int64_t which = piece.count < DEPTH ? piece.first / piece.count : 2;
    Reg totals[ROWS * REGS] = {};
    float x_sums[ROWS] = {};
    for (int64_t k = 0; k < piece.count; k += step, ++x) {
        Reg sum[ROWS][REGS] = {};
        for (int64_t i = 0; i < step; ++i) {
            Reg w[REGS];
#pragma GCC unroll 8
            for (int64_t r = 0; r < REGS; ++r)
                memcpy(&w[r], piece.codes + (r / PARTS * CHUNK + k + i) * PANEL + r % PARTS * WIDTH, sizeof(Reg));
#pragma GCC unroll 8
            for (int64_t row = 0; row < ROWS; ++row) {
                const Reg value = broadcast(x[row * stride].codes + piece.first + i);
#pragma GCC unroll 8
                for (int64_t r = 0; r < REGS; ++r) sum[row][r] = multiply_add(w[r], value, sum[row][r]);
            }
        }
#pragma GCC unroll 8
        for (int64_t row = 0; row < ROWS; ++row) {
            const Reg scale = broadcast(&x[row * stride].scale);
            x_sums[row] += x[row * stride].sums[which];
#pragma GCC unroll 8
            for (int64_t r = 0; r < REGS; ++r)
                totals[row * REGS + r] = multiply_add(sum[row][r], scale, totals[row * REGS + r]);
        }
    }
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t r = 0; r < REGS; ++r) {
            Reg total, scale, offset;
            float* to = sums + (row * REGS + r) * WIDTH;
            memcpy(&total, to, sizeof total);
            memcpy(&scale, piece.scales + r * WIDTH, sizeof scale);
            memcpy(&offset, piece.offsets + r * WIDTH, sizeof offset);
            total = multiply_add(totals[row * REGS + r], scale, total);
            if (piece.has_offset) total = multiply_add(-offset, broadcast(&x_sums[row]), total);
            memcpy(to, &total, sizeof total);
        }
}

using Tile = void (*)(float*, const X*, int64_t, const Piece&);

template <size_t... I>
inline Tile tile_at(int64_t index, std::index_sequence<I...>) {
    static constexpr Tile table[] = {add_tile<I / PANELS + 1, I % PANELS + 1>...};
    return table[index];
}

template <class Weight>
inline void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, CodedPanel w,
                  int64_t panels, Prefetch) {
    alignas(64) Piece piece;
    const int64_t padded = round_up(K, DEPTH), blocks = padded / DEPTH, tiles = (rows + ROWS - 1) / ROWS;
    const X* x = (const X*)prepared + first * blocks;
    piece.has_offset = w.header->zeros;
    memset(sums, 0, rows * panels * PANEL * sizeof(float));
    for (int64_t k = 0; k < padded; k += piece.count) {
        piece.count = int8_rows::num_inputs(k, padded, w.header->group);
        piece.first = k % DEPTH;
        for (int64_t p = 0; p < panels; ++p) widen<Weight>(piece, w, p, k);
        for (int64_t t = 0; t < tiles; ++t) {
            const Range range = split_range(rows, 1, t, tiles);
            const int64_t index = (range.count() - 1) * PANELS + panels - 1;
            tile_at(index, std::make_index_sequence<ROWS * PANELS>{})(
                sums + range.first * panels * PANEL, x + range.first * blocks + k / DEPTH, blocks, piece);
        }
    }
}

template <class Element, class Weight>
constexpr Microkernel<Element, Weight> MICROKERNEL = {{{ANY_ROWS, BLOCK_ROWS, PANELS}},
                                                      1,
                                                      int8_rows::BYTES<float>,
                                                      do_nothing,
                                                      do_nothing,
                                                      int8_rows::prepare<Weight, float, Element>,
                                                      block<Weight>,
                                                      "float32"};

}  // namespace int8_widened
}  // namespace sage
