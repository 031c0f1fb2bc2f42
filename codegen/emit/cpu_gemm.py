"""Emits GEMMs on the CPU: the blocked loops of `runtime/kernels/cpu/products.h`, around the op's own equations.

const Factors<E> factors = {R, K, N, 1, w};
product(WAY, TUNING, factors, [&](int64_t iR) { return x + iR * x_R; }, [&](int64_t iR, auto iN, const float* sums) {
    store(y + iR * y_R, iN, to<E>(load(sums, Block{0})));
});
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sageLLM.codegen.emit.cpp_text import CppText, Piece, size_text
from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.kernel.gemm import SUMS, Gemm
from sageLLM.codegen.kernel.rows import Affine, Load, Location, Loop

INNER = "iInner"
"""The variable along the summed dim, which addresses leave out."""

SEEN = "allSeen"
"""The name of the object that reads the blocks of the result as they are computed."""


@dataclass(slots=True)
class GemmText(CppText):
    """Expressions of an epilogue: the sums are in registers, one block for each gate.

    `consumed` is the output whose blocks the fused consumer reads, if there is one.
    """

    gemm: Gemm | None = None
    consumed: str = ""

    def _load(self, location: Location, expr: Load) -> Piece:
        if location.operand != SUMS or self.gemm is None:
            return super(GemmText, self)._load(location, expr)
        gate = self.gemm.gate_of(expr)
        return Piece(f"load(sums, Block{{{f'{gate} * PANEL' if gate else '0'}}})")

    def is_lanes(self, expr: Expr) -> bool:
        is_sum = isinstance(expr, Load) and expr.location.operand == SUMS
        return is_sum or super(GemmText, self).is_lanes(expr)

    def stored(self, location: Location, value: Expr) -> str:
        """The stored value, passed through the consumer if that reads it."""
        text = super(GemmText, self).stored(location, value)
        if location.operand != self.consumed or self.gemm is None:
            return text
        return f"ownSeen.with({_rows(self.gemm).variable}, {self.gemm.sweep.loop.variable}, {text})"


def gemm_lines(gemm: Gemm, writer: GemmText, inside: Sequence[str]) -> list[str]:
    """The call; `inside` are the lines of the sweep, which `writer` wrote."""
    groups = [loop for loop in gemm.epilogue.rows if loop.extent in gemm.groups]
    start = ["product(WAY, TUNING, factors,"]
    if groups:
        count, each = size_text(groups[0].extent), size_text(_rows(gemm).extent)
        start = [f"products(WAY, TUNING, {count}, factors,", f"        [&](int64_t) {{ return {each}; }},"]
    epilogue = _epilogue_lines(gemm, "[&]", inside)
    return [_factors_line(gemm), *start, _row_of(gemm, writer), *indented([*epilogue, "});"], 2)]


def fused_lines(gemm: Gemm, writer: GemmText, inside: Sequence[str], epilogue_class: str) -> list[str]:
    """The call, and an object of `epilogue_class` that reads the results, with a part for each part of the work.

    const SampleFollower allSeen(S, allParts.columns);
    product_by_part(WAY, TUNING, factors, allParts, ..., [&](int64_t iPart) {
        return [&, ownSeen = allSeen.part(iPart)](int64_t iS, auto iV, const float* sums) {
            store(logits + iS * logits_S, iV, ownSeen.with(iS, iV, to<E>(load(sums, Block{0}))));
        };
    });
    """
    epilogue = _epilogue_lines(gemm, f"return [&, ownSeen = {SEEN}.part(iPart)]", inside)
    return [
        _factors_line(gemm),
        "const Parts allParts = parts_of(TUNING, factors);",
        f"const {epilogue_class} {SEEN}({size_text(_rows(gemm).extent)}, allParts.columns);",
        "product_by_part(WAY, TUNING, factors, allParts,",
        _row_of(gemm, writer),
        *indented(["[&](int64_t iPart) {", *indented([*epilogue, "};"]), "});"], 2),
    ]


def indented(lines: Sequence[str], by: int = 1) -> list[str]:
    return [f"{'    ' * by}{line}" for line in lines]


def _rows(gemm: Gemm) -> Loop:
    rows = [loop for loop in gemm.epilogue.rows if loop.extent not in gemm.groups]
    is_known = len(rows) == 1 and len(gemm.epilogue.rows) == len(gemm.groups) + 1
    assert is_known, "a product has one dim of rows beside its groups"
    return rows[0]


def _factors_line(gemm: Gemm) -> str:
    """`const Factors<E> factors = {R, K, N, 1, w};`"""
    extents = (_rows(gemm).extent, gemm.inner, gemm.sweep.loop.extent)
    sizes = ", ".join(map(size_text, extents))
    return f"const Factors<{gemm.w.type.element}> factors = {{{sizes}, {gemm.gates}, {gemm.w.name}}};"


def _epilogue_lines(gemm: Gemm, captures: str, inside: Sequence[str]) -> list[str]:
    """The lambda of a block of sums, without its closing bracket."""
    variable = gemm.sweep.loop.variable
    return [f"{captures}({_parameters(gemm)}, auto {variable}, const float* sums) {{", *indented(inside)]


def _parameters(gemm: Gemm) -> str:
    """The group, if there are any, and the row."""
    groups = [loop for loop in gemm.epilogue.rows if loop.extent in gemm.groups]
    return ", ".join(f"int64_t {loop.variable}" for loop in (*groups, _rows(gemm)))


def _row_of(gemm: Gemm, writer: GemmText) -> str:
    """`[&](int64_t iR) { return x + iR * x_R; },`"""
    positions = {loop.extent: Affine.of(loop.variable) for loop in gemm.epilogue.rows}
    positions[gemm.inner] = Affine.of(INNER)
    location = Location(gemm.x.name, tuple(positions[dim] for dim in gemm.x.type.dims))
    row = GemmText(writer.operands, {}, {}, Loop(INNER, gemm.inner))
    return f"        [&]({_parameters(gemm)}) {{ return {row.address(location)[0]}; }},"
