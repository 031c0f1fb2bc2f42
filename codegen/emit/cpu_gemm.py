"""Emits GEMMs on the CPU: the blocked loops of `runtime/kernels/cpu/gemm.h`, around the op's own equations.

const GemmArgs<E, Weight> args = {R, K, N, 1, w};
gemm(MICROKERNEL, TUNING, args,
     [&](int64_t i_R) { return x + i_R * x_R; },
     [&](int64_t i_R, auto i_N, const float* sums) { store(y + i_R * y_R, i_N, to<E>(load(sums, Block{0}))); });

With a row prologue, `gemm_of_computed_rows` takes the lines that compute a row in place of the lambda that finds one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sageLLM.codegen.emit.cpp_arguments import WEIGHT
from sageLLM.codegen.emit.cpp_text import CppText, Piece, cpp_name, size_text
from sageLLM.codegen.expr.size import volume
from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.kernel.gemm import SUMS, Gemm
from sageLLM.codegen.kernel.rows import Affine, Load, Location, Loop
from sageLLM.codegen.model.op import Operand

INNER = "i_inner"
"""The variable along the summed dim, which addresses leave out."""

EPILOGUE = "epilogue"
"""The name of the object that reads the blocks of the result as they are computed."""


@dataclass(slots=True)
class GemmText(CppText):
    """Expressions of an epilogue: the sums are in registers, one block for each gate.

    `consumed` is the output that the fused consumer reads block by block, if there is one.
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
        return f"part_epilogue.observe({_rows(self.gemm).variable}, {self.gemm.sweep.loop.variable}, {text})"


def gemm_lines(gemm: Gemm, writer: GemmText, inside: Sequence[str]) -> list[str]:
    """The call; `inside` are the lines of the sweep, which `writer` wrote."""
    groups = [loop for loop in gemm.epilogue.rows if loop.extent in gemm.groups]
    start = ["gemm(MICROKERNEL, TUNING, args,"]
    if groups:
        count, each = size_text(groups[0].extent), size_text(_rows(gemm).extent)
        start = [f"grouped_gemm(MICROKERNEL, TUNING, {count}, args,", f"        [&](int64_t) {{ return {each}; }},"]
    epilogue = _epilogue_lines(gemm, "[&]", inside)
    return [_args_line(gemm), *start, _row_of(gemm, writer), *indented([*epilogue, "});"], 2)]


def fused_lines(gemm: Gemm, writer: GemmText, inside: Sequence[str], epilogue_class: str) -> list[str]:
    """The call, and an object of `epilogue_class` that reads the results, with a part for each part of the work.

    const SampleEpilogue epilogue(S, parts.columns);
    gemm_by_part(MICROKERNEL, TUNING, args, parts, ..., [&](int64_t part) {
        return [&, part_epilogue = epilogue.part(part)](int64_t i_S, auto i_V, const float* sums) {
            store(logits + i_S * logits_S, i_V, part_epilogue.observe(i_S, i_V, to<E>(load(sums, Block{0}))));
        };
    });
    """
    epilogue = _epilogue_lines(gemm, f"return [&, part_epilogue = {EPILOGUE}.part(part)]", inside)
    return [
        _args_line(gemm),
        "const GemmParts parts = gemm_parts(TUNING, args);",
        f"const {epilogue_class} {EPILOGUE}({size_text(_rows(gemm).extent)}, parts.columns);",
        "gemm_by_part(MICROKERNEL, TUNING, args, parts,",
        _row_of(gemm, writer),
        *indented(["[&](int64_t part) {", *indented([*epilogue, "};"]), "});"], 2),
    ]


def computed_rows_lines(gemm: Gemm, row: Sequence[str], inside: Sequence[str]) -> list[str]:
    """The call with a row prologue; `row` are the lines that compute a row.

    gemm_of_computed_rows(MICROKERNEL, TUNING, args,
        [&](int64_t i_R, E* n) { ... store(n, i_K, to<E>(n_2 * load(w, i_K))); ... },
        [&](int64_t i_R, auto i_N, const float* sums) { ... });
    """
    start = f"[&]({_parameters(gemm)}, {gemm.x.type.element}* {cpp_name(gemm.x.name)}) {{"
    epilogue = _epilogue_lines(gemm, "[&]", inside)
    call = "gemm_of_computed_rows(MICROKERNEL, TUNING, args,"
    return [_args_line(gemm), call, *indented([start, *indented(row), "},", *epilogue, "});"], 2)]


def scratch_lines(x: Operand) -> list[str]:
    """`E* n = scratch<E>(Scratch::COMPUTED_ROWS, S * H);`"""
    element = x.type.element
    size = size_text(volume(x.type.dims))
    return [f"{element}* {cpp_name(x.name)} = scratch<{element}>(Scratch::COMPUTED_ROWS, {size});"]


def scratch_strides(x: Operand) -> list[str]:
    """The strides of all dims but the last, of contiguous memory."""
    sizes = [size_text(volume(x.type.dims[at + 1 :])) for at in range(len(x.type.dims) - 1)]
    return [text if text.isidentifier() else f"({text})" for text in sizes]


def indented(lines: Sequence[str], by: int = 1) -> list[str]:
    return [f"{'    ' * by}{line}" for line in lines]


def _rows(gemm: Gemm) -> Loop:
    rows = [loop for loop in gemm.epilogue.rows if loop.extent not in gemm.groups]
    is_known = len(rows) == 1 and len(gemm.epilogue.rows) == len(gemm.groups) + 1
    assert is_known, "a GEMM must have one dim of rows besides its groups"
    return rows[0]


def _args_line(gemm: Gemm) -> str:
    """`const GemmArgs<E, Weight> args = {R, K, N, 1, w};`"""
    extents = (_rows(gemm).extent, gemm.inner, gemm.sweep.loop.extent)
    sizes = ", ".join(map(size_text, extents))
    return f"const GemmArgs<{gemm.w.type.element}, {WEIGHT}> args = {{{sizes}, {gemm.gates}, {cpp_name(gemm.w.name)}}};"


def _epilogue_lines(gemm: Gemm, captures: str, inside: Sequence[str]) -> list[str]:
    """The lambda of a block of sums, without its closing bracket."""
    variable = gemm.sweep.loop.variable
    return [f"{captures}({_parameters(gemm)}, auto {variable}, const float* sums) {{", *indented(inside)]


def _parameters(gemm: Gemm) -> str:
    """The group, if there are any, and the row."""
    groups = [loop for loop in gemm.epilogue.rows if loop.extent in gemm.groups]
    return ", ".join(f"int64_t {loop.variable}" for loop in (*groups, _rows(gemm)))


def _row_of(gemm: Gemm, writer: GemmText) -> str:
    """`[&](int64_t i_R) { return x + i_R * x_R; },`"""
    positions = {loop.extent: Affine.of(loop.variable) for loop in gemm.epilogue.rows}
    positions[gemm.inner] = Affine.of(INNER)
    location = Location(gemm.x.name, tuple(positions[dim] for dim in gemm.x.type.dims))
    row = GemmText(writer.operands, {}, {}, Loop(INNER, gemm.inner))
    return f"        [&]({_parameters(gemm)}) {{ return {row.address(location)[0]}; }},"
