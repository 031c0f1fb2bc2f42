// Packed weights of the GEMM kernels: panels of 16 output features, each of which is one stream of memory.
//
//   f32, f16   [ceil(N/16)][ceil(K/32)][32][16]
//   bf16       [ceil(N/16)][ceil(K/32)][16][16][2]   pairs along K, the operands of both AMX tiles and AVX512_BF16
//
// Padding beyond N or K is zero. A weight of G gates (gate and up of a feed-forward layer, [G*N][K]) alternates the
// panels of its gates, so that one block of results contains all gates of its features.
#pragma once

#include "kernel.h"

namespace sage {

constexpr int64_t PANEL = 16;  // output features
constexpr int64_t DEPTH = 32;  // K is padded to a multiple of this: the depth of an AMX tile of bf16

template <class Element>
struct Packing {
    static constexpr int64_t GROUP = 1;  // adjacent elements along K
    using Word = Element;                // one group
};
template <>
struct Packing<bf16> {
    static constexpr int64_t GROUP = 2;
    using Word = uint32_t;
};

// The number of elements of a panel, and of a packed [gates * N][K].
inline int64_t panel_size(int64_t K) { return PANEL * round_up(K, DEPTH); }
inline int64_t packed_size(int64_t gates, int64_t N, int64_t K) {
    return gates * (round_up(N, PANEL) / PANEL) * panel_size(K);
}

// The panels of a packed weight, which the GEMM takes one after another. `At` is what a microkernel knows of the first
// panel of a block. Coded weights (coded.h) have panels of another size.
template <class Weight>
struct Panels {
    using At = const Weight*;
    const char* first;
    int64_t bytes;       // of a panel
    int64_t step_bytes;  // of DEPTH elements along K

    static Panels of(const Weight* w, int64_t K) {
        return {(const char*)w, panel_size(K) * (int64_t)sizeof(Weight), DEPTH * PANEL * (int64_t)sizeof(Weight)};
    }
    At at(int64_t panel) const { return (const Weight*)(first + panel * bytes); }
};

// Transposes groups k to `stop` of up to 16 rows. Rows beyond `rows` are zero.
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

// Packs a weight [gates * N][K] with a row stride of `stride`.
template <class Element>
inline void pack(Element* packed, const Element* w, int64_t stride, int64_t gates, int64_t N, int64_t K) {
    int64_t blocks = round_up(N, PANEL) / PANEL;
    parallel_for_rows(gates * blocks, gates * N * K, [&](int64_t p) {
        int64_t gate = p % gates, first = p / gates * PANEL, rows = N - first < PANEL ? N - first : PANEL;
        pack_panel(packed + p * panel_size(K), w + (gate * N + first) * stride, stride, rows, K);
    });
}

// Row n of a packed [N][K]: a table that is both embedding and head is stored once.
template <class Element>
inline void unpack_row(Element* row, const Element* packed, int64_t n, int64_t K) {
    constexpr int64_t GROUP = Packing<Element>::GROUP;
    const Element* panel = packed + n / PANEL * panel_size(K) + n % PANEL * GROUP;
    for (int64_t k = 0; k < K; ++k) row[k] = panel[k / GROUP * GROUP * PANEL + k % GROUP];
}

}  // namespace sage
