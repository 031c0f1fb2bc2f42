// Products of rows with a packed weight: how the work is cut into parts for threads, and these into blocks.
//
// A part prepares its rows of x, then goes through its columns of the weight in chunks that stay in the cache while all
// of its rows pass; the next chunk is fetched meanwhile. With few rows the weight is the work, so parts share its
// columns; with many, they share the rows. Neither changes a result: a sum along K is one part's, in one order.
#pragma once

#include "routes.h"
#include "ways.h"

namespace sage {

// Figures of a machine, which the spec gives.
struct Tuning {
    int64_t prepared_bytes;  // of prepared x that stay in the cache
    int64_t chunk_bytes;     // of a weight that stay in the cache
    int64_t rows_per_part;   // rows that are worth a part of the work of their own
    int64_t ahead_bytes;     // of a panel, between what is read and what is fetched
    int64_t streams;         // in which memory is best read
};

// Rows times a weight of `gates` * N features. An output element needs the sums of all gates.
template <class Element>
struct Factors {
    int64_t rows, K, N, gates;
    const Element* w;  // packed

    int64_t columns() const { return round_up(N, PANEL) / PANEL; }  // each is `gates` panels
    int64_t column_size() const { return gates * panel_size(K); }
};

// Calls finish(row, Block or Tail of features, the sums of each gate) for what a block has computed.
template <class Element, class Finish>
inline void hand_out(const Factors<Element>& factors, const float* sums, Range rows, Range columns, Finish&& finish) {
    for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t column = columns.first; column < columns.last; ++column, sums += factors.gates * PANEL) {
            const int64_t at = column * PANEL;
            if (at + PANEL <= factors.N)
                finish(row, Block{at}, sums);
            else
                finish(row, Tail{at, factors.N - at}, sums);
        }
}

// What to fetch in a block that reads its panels once: the same panels, a little ahead.
template <class Element>
inline Ahead ahead_in(const Tuning& tuning, const Factors<Element>& factors, Range columns) {
    const int64_t panel = panel_size(factors.K) * (int64_t)sizeof(Element);
    const char* from = (const char*)(factors.w + columns.first * factors.column_size()) + tuning.ahead_bytes;
    return {from, DEPTH * PANEL * (int64_t)sizeof(Element) / 64, columns.count() * factors.gates, panel, true};
}

// What to fetch in `blocks` blocks that read other panels than these, which come next.
template <class Element>
inline Ahead ahead_of(const Tuning& tuning, const Factors<Element>& factors, Range columns, int64_t blocks) {
    const int64_t lines = columns.count() * factors.column_size() * (int64_t)sizeof(Element) / 64;
    const int64_t steps = blocks * (round_up(factors.K, DEPTH) / DEPTH), each = (lines + steps - 1) / steps;
    const int64_t streams = each < tuning.streams ? (each > 1 ? each : 1) : tuning.streams;
    const char* from = (const char*)(factors.w + columns.first * factors.column_size());
    return {from, (each + streams - 1) / streams, streams, (lines + streams - 1) / streams * 64, false};
}

// Prepared rows, whose numbers are `rows`, times some columns, chunk by chunk.
template <class Element, class Finish>
inline void multiply_prepared(const Way<Element>& way, const Tuning& tuning, const Factors<Element>& factors,
                              const void* prepared, Range rows, Range columns, Finish&& finish) {
    const int64_t size = factors.column_size() * (int64_t)sizeof(Element), steps = round_up(factors.K, DEPTH) / DEPTH;
    const int64_t wide = (rows.count() <= way.few_rows ? way.few_panels : way.panels) / factors.gates;
    const int64_t heights = (rows.count() + way.rows - 1) / way.rows;
    const int64_t fitting = tuning.chunk_bytes / (size * wide) > 1 ? tuning.chunk_bytes / (size * wide) : 1;
    const int64_t chunk = wide * minimum(heights, fitting);
    alignas(64) float sums[MAX_SUMS];
    for (int64_t from = columns.first; from < columns.last; from += chunk) {
        const int64_t to = minimum(from + chunk, columns.last), blocks = heights * ((to - from + wide - 1) / wide);
        Ahead ahead = ahead_of(tuning, factors, {to, minimum(to + chunk, columns.last)}, blocks);
        for (int64_t h = 0; h < heights; ++h) {
            const Range part = share(rows.count(), way.row_step, h, heights);
            for (int64_t column = from; column < to; column += wide) {
                const Range few = {column, minimum(column + wide, to)};
                way.block(sums, prepared, part.first, part.count(), factors.K,
                          factors.w + column * factors.column_size(), few.count() * factors.gates,
                          heights == 1 ? ahead_in(tuning, factors, few) : ahead);
                ahead.from += ahead.lines * steps * 64;
                hand_out(factors, sums, {rows.first + part.first, rows.first + part.last}, few, finish);
            }
        }
    }
}

// Some rows times some columns, by one thread. `row_of(i)` is row i of x.
template <class Element, class RowOf, class Finish>
inline void multiply(const Way<Element>& way, const Tuning& tuning, const Factors<Element>& factors, Range rows,
                     Range columns, RowOf&& row_of, Finish&& finish) {
    const int64_t row_bytes = round_up(factors.K, DEPTH) * way.value_size;
    const int64_t fitting = round_up(tuning.prepared_bytes / row_bytes + 1, way.rows);
    const int64_t parts = (rows.count() + fitting - 1) / fitting;
    for (int64_t part = 0; part < parts; ++part) {
        const Range own = share(rows.count(), way.row_step, part, parts);
        const Element** x = scratch<const Element*>(6, own.count());
        for (int64_t row = 0; row < own.count(); ++row) x[row] = row_of(rows.first + own.first + row);
        void* prepared = scratch<char>(7, round_up(own.count(), way.row_step) * row_bytes);
        way.prepare(prepared, x, own.count(), factors.K);
        const Range numbers = {rows.first + own.first, rows.first + own.last};
        multiply_prepared(way, tuning, factors, prepared, numbers, columns, finish);
    }
}

// How many parts a product is worth. Each should read a few hundred kilobytes of weights, or do as much work on fewer.
inline int64_t product_parts(int64_t weights, int64_t rows) {
    return num_parts(INT64_MAX, weights * (1 + rows / 16) / (4 * PARALLEL_WORK));
}

// Into how many parts the rows and the columns of a product are cut.
struct Parts {
    int64_t rows, columns;
};

template <class Element>
inline Parts parts_of(const Tuning& tuning, const Factors<Element>& factors) {
    const int64_t parts = product_parts(factors.gates * factors.N * factors.K, factors.rows);
    const int64_t of_rows = minimum(parts, factors.rows / tuning.rows_per_part + 1);
    return {of_rows, minimum(factors.columns(), (parts + of_rows - 1) / of_rows)};
}

// One product, in parts that each have some of the rows and some of the columns. A part finishes its blocks by
// finish_of(the number of its columns): what that sees of a row are blocks of features in their order.
template <class Element, class RowOf, class FinishOf>
inline void product_by_part(const Way<Element>& way, const Tuning& tuning, const Factors<Element>& factors,
                            const Parts& parts, RowOf&& row_of, FinishOf&& finish_of) {
    if (!factors.rows || !factors.N) return;
    each_part(parts.rows * parts.columns, [&](int64_t part) {
        auto&& finish = finish_of(part % parts.columns);
        way.begin();
        multiply(way, tuning, factors, share(factors.rows, way.row_step, part / parts.columns, parts.rows),
                 share(factors.columns(), 1, part % parts.columns, parts.columns), row_of, finish);
        way.end();
    });
}

template <class Element, class RowOf, class Finish>
inline void product(const Way<Element>& way, const Tuning& tuning, const Factors<Element>& factors, RowOf&& row_of,
                    Finish&& finish) {
    product_by_part(way, tuning, factors, parts_of(tuning, factors), row_of, [&](int64_t) -> Finish& { return finish; });
}

// Several products with a weight each, as of experts or of heads.
//
// `rows_of(group)` rows belong to a group; row_of and finish get the group before the row.
template <class Element, class RowsOf, class RowOf, class Finish>
inline void products(const Way<Element>& way, const Tuning& tuning, int64_t groups, const Factors<Element>& each,
                     RowsOf&& rows_of, RowOf&& row_of, Finish&& finish) {
    const int64_t size = each.column_size(), columns = each.columns();
    const int64_t wide = (tuning.chunk_bytes / (int64_t)sizeof(Element) + size - 1) / size, parts = (columns + wide - 1) / wide;
    const auto compute = [&](int64_t part) {
        const int64_t group = part / parts;
        Factors<Element> factors = each;
        factors.rows = rows_of(group);
        factors.w += group * columns * size;
        way.begin();
        multiply(way, tuning, factors, {0, factors.rows}, share(columns, 1, part % parts, parts),
                 [&](int64_t row) { return row_of(group, row); },
                 [&](int64_t row, auto features, const float* sums) { finish(group, row, features, sums); });
        way.end();
    };
    if (product_parts(groups * each.N * each.K, 1) > 1) return each_part(groups * parts, compute);
    for (int64_t part = 0; part < groups * parts; ++part) compute(part);
}

}  // namespace sage
