// GEMMs of rows with a packed weight: how the work is split into parts for threads, and a part into blocks.
//
// A part prepares its rows of x, then goes through its columns of the weight in chunks that stay in the L2 cache while
// all of its rows pass; the next chunk is prefetched meanwhile. With few rows reading the weight is the work, so parts
// split its columns; with many rows they split the rows. Neither changes a result: the sum along K belongs to one part
// and has one order, as splitting K would make results depend on the number of threads.
#pragma once

#include "isa.h"
#include "routes.h"

namespace sage {

// Tuning parameters of a machine, from specs/hardware.
struct Tuning {
    int64_t prepared_bytes;  // of prepared x that stay in the cache
    int64_t chunk_bytes;     // of a weight that stay in the cache
    int64_t rows_per_part;   // a part has at least this many rows if the rows are split
    int64_t prefetch_bytes;  // distance in a panel between the read position and the prefetched one
    int64_t streams;         // number of streams that memory is read in fastest
};

// The sizes of a GEMM and its weight of `gates` * N features. An element of the output needs the sums of all gates.
template <class Element, class Weight = Element>
struct GemmArgs {
    int64_t rows, K, N, gates;
    const Weight* w;  // packed
    Panels<Weight> panels = Panels<Weight>::of(w, K);

    int64_t columns() const { return round_up(N, PANEL) / PANEL; }  // each has `gates` panels
    int64_t column_bytes() const { return gates * panels.bytes; }
};

// Calls epilogue(row, Block or Tail of features, the sums of each gate) for all results of a block.
template <class Element, class Weight, class Epilogue>
inline void apply_epilogue(const GemmArgs<Element, Weight>& args, const float* sums, Range rows, Range columns,
                           Epilogue&& epilogue) {
    for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t column = columns.first; column < columns.last; ++column, sums += args.gates * PANEL) {
            const int64_t at = column * PANEL;
            if (at + PANEL <= args.N)
                epilogue(row, Block{at}, sums);
            else
                epilogue(row, Tail{at, args.N - at}, sums);
        }
}

// The prefetch of a block that reads its panels once: the same panels, `prefetch_bytes` further on.
template <class Element, class Weight>
inline Prefetch prefetch_own_panels(const Tuning& tuning, const GemmArgs<Element, Weight>& args, Range columns) {
    const char* from = args.panels.first + columns.first * args.column_bytes() + tuning.prefetch_bytes;
    return {from, args.panels.step_bytes / 64, columns.count() * args.gates, args.panels.bytes, true};
}

// The prefetch of `blocks` blocks that read other panels: the columns of the next chunk, spread evenly over the blocks.
template <class Element, class Weight>
inline Prefetch prefetch_next_chunk(const Tuning& tuning, const GemmArgs<Element, Weight>& args, Range columns,
                                    int64_t blocks) {
    const int64_t lines = columns.count() * args.column_bytes() / 64;
    const int64_t steps = blocks * (round_up(args.K, DEPTH) / DEPTH), each = (lines + steps - 1) / steps;
    const int64_t streams = each < tuning.streams ? (each > 1 ? each : 1) : tuning.streams;
    const char* from = args.panels.first + columns.first * args.column_bytes();
    return {from, (each + streams - 1) / streams, streams, (lines + streams - 1) / streams * 64, false};
}

// Prepared rows, which have the numbers `rows`, times some columns, chunk by chunk.
template <class Element, class Weight, class Epilogue>
inline void gemm_prepared(const Microkernel<Element, Weight>& microkernel, const Tuning& tuning,
                          const GemmArgs<Element, Weight>& args, const void* prepared, Range rows, Range columns,
                          Epilogue&& epilogue) {
    const int64_t size = args.column_bytes(), steps = round_up(args.K, DEPTH) / DEPTH;
    const BlockShape& shape = microkernel.shape(rows.count());
    const int64_t width = shape.panels / args.gates, heights = (rows.count() + shape.rows - 1) / shape.rows;
    const int64_t fitting = tuning.chunk_bytes / (size * width) > 1 ? tuning.chunk_bytes / (size * width) : 1;
    const int64_t chunk = width * minimum(heights, fitting);
    alignas(64) float sums[MAX_SUMS];
    for (int64_t from = columns.first; from < columns.last; from += chunk) {
        const int64_t to = minimum(from + chunk, columns.last), blocks = heights * ((to - from + width - 1) / width);
        Prefetch prefetch = prefetch_next_chunk(tuning, args, {to, minimum(to + chunk, columns.last)}, blocks);
        for (int64_t h = 0; h < heights; ++h) {
            const Range part = split_range(rows.count(), microkernel.row_step, h, heights);
            for (int64_t column = from; column < to; column += width) {
                const Range block = {column, minimum(column + width, to)};
                microkernel.block(sums, prepared, part.first, part.count(), args.K, args.panels.at(column * args.gates),
                                  block.count() * args.gates,
                                  heights == 1 ? prefetch_own_panels(tuning, args, block) : prefetch);
                prefetch.from += prefetch.lines * steps * 64;
                apply_epilogue(args, sums, {rows.first + part.first, rows.first + part.last}, block, epilogue);
            }
        }
    }
}

// Some rows times some columns, by one thread. `row_of(i)` is row i of x.
template <class Element, class Weight, class RowOf, class Epilogue>
inline void gemm_range(const Microkernel<Element, Weight>& microkernel, const Tuning& tuning,
                       const GemmArgs<Element, Weight>& args, Range rows, Range columns, RowOf&& row_of,
                       Epilogue&& epilogue) {
    const int64_t row_bytes = round_up(args.K, DEPTH) * microkernel.x_element_size + ROW_PADDING;
    const int64_t fitting = round_up(tuning.prepared_bytes / row_bytes + 1, microkernel.shape(rows.count()).rows);
    const int64_t parts = (rows.count() + fitting - 1) / fitting;
    for (int64_t part = 0; part < parts; ++part) {
        const Range range = split_range(rows.count(), microkernel.row_step, part, parts);
        const Element** x = scratch<const Element*>(Scratch::GEMM_ROWS, range.count());
        for (int64_t row = 0; row < range.count(); ++row) x[row] = row_of(rows.first + range.first + row);
        void* prepared =
            scratch<char>(Scratch::PREPARED_ROWS, round_up(range.count(), microkernel.row_step) * row_bytes);
        microkernel.prepare(prepared, x, range.count(), args.K);
        const Range numbers = {rows.first + range.first, rows.first + range.last};
        gemm_prepared(microkernel, tuning, args, prepared, numbers, columns, epilogue);
    }
}

// The number of parts that a GEMM is worth: each should read a few hundred kilobytes of weights, or do as much work.
inline int64_t num_gemm_parts(int64_t weights, int64_t rows) {
    return num_parts(INT64_MAX, weights * (1 + rows / 16) / (4 * PARALLEL_WORK));
}

// The number of parts that the rows and the columns of a GEMM are split into.
struct GemmParts {
    int64_t rows, columns;
};

template <class Element, class Weight>
inline GemmParts gemm_parts(const Tuning& tuning, const GemmArgs<Element, Weight>& args) {
    const int64_t parts = num_gemm_parts(args.gates * args.N * args.K, args.rows);
    const int64_t row_parts = minimum(parts, args.rows / tuning.rows_per_part + 1);
    return {row_parts, minimum(args.columns(), (parts + row_parts - 1) / row_parts)};
}

// One GEMM, in parts that each have some of the rows and some of the columns. The epilogue of a part is
// epilogue_of(the number of its columns); it receives the blocks of features of a row in order.
template <class Element, class Weight, class RowOf, class EpilogueOf>
inline void gemm_by_part(const Microkernel<Element, Weight>& microkernel, const Tuning& tuning,
                         const GemmArgs<Element, Weight>& args, const GemmParts& parts, RowOf&& row_of,
                         EpilogueOf&& epilogue_of) {
    if (!args.rows || !args.N) return;
    parallel_for(parts.rows * parts.columns, [&](int64_t part) {
        auto&& epilogue = epilogue_of(part % parts.columns);
        const MicrokernelScope scope(microkernel);
        gemm_range(microkernel, tuning, args,
                   split_range(args.rows, microkernel.row_step, part / parts.columns, parts.rows),
                   split_range(args.columns(), 1, part % parts.columns, parts.columns), row_of, epilogue);
    });
}

template <class Element, class Weight, class RowOf, class Epilogue>
inline void gemm(const Microkernel<Element, Weight>& microkernel, const Tuning& tuning,
                 const GemmArgs<Element, Weight>& args, RowOf&& row_of, Epilogue&& epilogue) {
    gemm_by_part(microkernel, tuning, args, gemm_parts(tuning, args), row_of,
                 [&](int64_t) -> Epilogue& { return epilogue; });
}

// A GEMM of rows that a prologue computes: prologue(row, to) writes row `row` of x to `to`.
//
// Every row is computed once, before its block of rows is multiplied, as all parts of a GEMM read the rows. A block has
// enough rows for all threads to split them, so that the weight is read as often as without blocks.
template <class Element, class Weight, class Prologue, class Epilogue>
inline void gemm_of_computed_rows(const Microkernel<Element, Weight>& microkernel, const Tuning& tuning,
                                  const GemmArgs<Element, Weight>& args, Prologue&& prologue, Epilogue&& epilogue) {
    const int64_t block = minimum(args.rows, tuning.rows_per_part * PARTS_PER_THREAD * sage_num_threads());
    Element* x = scratch<Element>(Scratch::COMPUTED_ROWS, block * args.K);
    for (int64_t first = 0; first < args.rows; first += block) {
        GemmArgs<Element, Weight> rest = args;
        rest.rows = minimum(block, args.rows - first);
        parallel_for_rows(rest.rows, rest.rows * args.K, [&](int64_t row) { prologue(first + row, x + row * args.K); });
        gemm(
            microkernel, tuning, rest, [&](int64_t row) { return x + row * args.K; },
            [&](int64_t row, auto features, const float* sums) { epilogue(first + row, features, sums); });
    }
}

// Several GEMMs with a weight each, as of experts or of heads.
//
// `rows_of(group)` is the number of rows of a group; row_of and epilogue take the group before the row. Weights are the
// work here, as groups have few rows each, so parts split the columns of every group and never the rows.
template <class Element, class Weight, class RowsOf, class RowOf, class Epilogue>
inline void grouped_gemm(const Microkernel<Element, Weight>& microkernel, const Tuning& tuning, int64_t groups,
                         const GemmArgs<Element, Weight>& each, RowsOf&& rows_of, RowOf&& row_of, Epilogue&& epilogue) {
    const int64_t size = each.column_bytes(), columns = each.columns();
    const int64_t width = (tuning.chunk_bytes + size - 1) / size;
    const int64_t parts = (columns + width - 1) / width;
    const auto compute = [&](int64_t part) {
        const int64_t group = part / parts;
        GemmArgs<Element, Weight> args = each;
        args.rows = rows_of(group);
        args.panels.first += group * columns * size;
        const MicrokernelScope scope(microkernel);
        gemm_range(
            microkernel, tuning, args, {0, args.rows}, split_range(columns, 1, part % parts, parts),
            [&](int64_t row) { return row_of(group, row); },
            [&](int64_t row, auto features, const float* sums) { epilogue(group, row, features, sums); });
    };
    if (num_gemm_parts(groups * each.N * each.K, 1) > 1) return parallel_for(groups * parts, compute);
    for (int64_t part = 0; part < groups * parts; ++part) compute(part);
}

}  // namespace sage
