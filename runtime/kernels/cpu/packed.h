// Weights as the linear kernels read them: panels of 16 output features, so that one panel is one stream of memory.
//
//   f32, f16   [ceil(N/16)][ceil(K/32)][32][16]
//   bf16       [ceil(N/16)][ceil(K/32)][16][16][2]   pairs along K, which both AMX tiles and AVX512_BF16 multiply at once
//
// What a panel has beyond N or K is zero. A weight of G gates (gate and up of a feed-forward layer, [G*N][K]) has the
// panels of its gates in turn, so that one block of results holds all gates of its features.
#pragma once

#include "kernel.h"

namespace sage {

constexpr int64_t PANEL = 16;  // output features
constexpr int64_t DEPTH = 32;  // K is filled up to a multiple of this

template <class Element>
struct Packing {
    static constexpr int64_t GROUP = 1;  // elements along K that lie side by side
    using Word = Element;                // a group
};
template <>
struct Packing<bf16> {
    static constexpr int64_t GROUP = 2;
    using Word = uint32_t;
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Elements of a panel, and of a packed [gates * N][K].
inline int64_t panel_size(int64_t K) { return PANEL * round_up(K, DEPTH); }
inline int64_t packed_size(int64_t gates, int64_t N, int64_t K) {
    return gates * (round_up(N, PANEL) / PANEL) * panel_size(K);
}

// Groups k to `stop` of up to 16 rows, transposed. Rows beyond `rows` count as zero.
template <class Element>
inline void pack_groups(Element* panel, const Element* w, int64_t stride, int64_t rows, int64_t k, int64_t stop) {
    using P = Packing<Element>;
    typename P::Word word;
    for (; k < stop; ++k) {
        for (int64_t n = 0; n < rows; ++n) {
            memcpy(&word, w + n * stride + k * P::GROUP, sizeof word);
            memcpy(panel + (k * PANEL + n) * P::GROUP, &word, sizeof word);
        }
        memset((void*)(panel + (k * PANEL + rows) * P::GROUP), 0, (PANEL - rows) * sizeof word);
    }
}

template <class Element>
inline void pack_panel(Element* panel, const Element* w, int64_t stride, int64_t rows, int64_t K) {
    using P = Packing<Element>;
    int64_t whole = K / P::GROUP;
    if (rows == PANEL)
        pack_groups<Element>(panel, w, stride, PANEL, 0, whole);
    else
        pack_groups<Element>(panel, w, stride, rows, 0, whole);
    int64_t used = whole * P::GROUP * PANEL;
    memset((void*)(panel + used), 0, (panel_size(K) - used) * sizeof(Element));
    for (int64_t n = 0; whole * P::GROUP < K && n < rows; ++n) panel[used + n * P::GROUP] = w[n * stride + K - 1];
}

// A weight [gates * N][K], whose rows are `stride` apart.
template <class Element>
inline void pack(Element* packed, const Element* w, int64_t stride, int64_t gates, int64_t N, int64_t K) {
    int64_t blocks = round_up(N, PANEL) / PANEL;
    each_row(gates * blocks, gates * N * K, [&](int64_t p) {
        int64_t gate = p % gates, first = p / gates * PANEL, rows = N - first < PANEL ? N - first : PANEL;
        pack_panel(packed + p * panel_size(K), w + (gate * N + first) * stride, stride, rows, K);
    });
}

// Row n of a packed [N][K]: a table that is both embedding and head is held once.
template <class Element>
inline void unpack_row(Element* row, const Element* packed, int64_t n, int64_t K) {
    constexpr int64_t GROUP = Packing<Element>::GROUP;
    const Element* panel = packed + n / PANEL * panel_size(K) + n % PANEL * GROUP;
    for (int64_t k = 0; k < K; ++k) row[k] = panel[k / GROUP * GROUP * PANEL + k % GROUP];
}

}  // namespace sage
