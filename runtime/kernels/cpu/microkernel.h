// Interface of the GEMM microkernels, which compute one block of sums. One is selected per machine (isa.h), for all
// batches.
//
// Each element of a result is one chain of additions along K, in the order of K. The chain does not depend on the
// block, the batch or the number of threads, so the result of a row depends on nothing but the row.
#pragma once

#include "packed.h"

namespace sage {

constexpr int64_t MAX_SUMS = 64 * 4 * PANEL;  // of a block, over all microkernels
constexpr int64_t ROW_PADDING = 64;           // bytes that a microkernel may leave between two prepared rows

// Weights to prefetch while a block is computed: for every DEPTH elements of K, `lines` cache lines of each of
// `streams` streams, which are `stride` bytes apart. A core reads several streams faster than one. Panels that this
// block itself reads go into the L1 cache; those of a later block go into L2 only, so that they do not evict the rows
// of x.
struct Prefetch {
    const char* from;
    int64_t lines, streams, stride;
    bool into_l1;
};

inline void prefetch_step(Prefetch& prefetch) {
    for (int64_t s = 0; s < prefetch.streams; ++s)
        for (int64_t i = 0; i < prefetch.lines; ++i) {
            const char* line = prefetch.from + s * prefetch.stride + i * 64;
            if (prefetch.into_l1)
                __builtin_prefetch(line, 0, 3);
            else
                __builtin_prefetch(line, 0, 2);
        }
    prefetch.from += prefetch.lines * 64;
}

// The rows and panels of a block, at most, in GEMMs with up to `gemm_rows` rows.
struct BlockShape {
    int64_t gemm_rows, rows, panels;
};
constexpr int64_t ANY_ROWS = INT64_MAX;

template <class Element, class Weight = Element>
struct Microkernel {
    BlockShape shapes[3];    // by ascending rows of the GEMM; the last one has ANY_ROWS
    int64_t row_step;        // prepared x is padded to a multiple of this many rows
    int64_t x_element_size;  // bytes per element of prepared x
    void (*begin)();         // called by each thread before its first block
    void (*end)();           // and after its last
    void (*prepare)(void* prepared, const Element* const* x, int64_t rows, int64_t K);
    // sums[rows][panels][PANEL] of the prepared rows from `first` on, and of the panels from w on
    void (*block)(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K,
                  typename Panels<Weight>::At w, int64_t panels, Prefetch prefetch);
    const char* name;

    const BlockShape& shape(int64_t gemm_rows) const {
        const BlockShape* found = shapes;
        while (found->gemm_rows < gemm_rows) ++found;
        return *found;
    }
};

inline void do_nothing() {}

// Calls `begin`, and `end` when it leaves its scope, also by an exception.
template <class Element, class Weight = Element>
class MicrokernelScope {
  public:
    explicit MicrokernelScope(const Microkernel<Element, Weight>& microkernel) : microkernel_(microkernel) {
        microkernel_.begin();
    }
    ~MicrokernelScope() { microkernel_.end(); }
    MicrokernelScope(const MicrokernelScope&) = delete;

  private:
    const Microkernel<Element, Weight>& microkernel_;
};

}  // namespace sage
