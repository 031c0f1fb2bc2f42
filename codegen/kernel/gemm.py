"""GEMMs: ops that multiply rows by a weight, and compute each element of the result from the sums of the same row.

    linear:           sums of x and w;       y[R, N] = E(acc + f32(bias[N]))
    linear_silu_mul:  sums of two gates;     y[R, I] = E(g * sigmoid(g)) * u

All equations after the dot product become the GEMM's epilogue, provided that an element of the output needs no other
elements; no intermediate result is written. The equations before it become a row prologue (`prologue.py`). A target
has to multiply, and to write a row program.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.tree import Dot, Expr, Program, Ref, Statement, walk
from sageLLM.codegen.expr.types import DTYPES
from sageLLM.codegen.kernel.check import check_inplace
from sageLLM.codegen.kernel.indexing import LoweringError
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.lower import row_program
from sageLLM.codegen.kernel.prologue import Prologue, Split, split_at
from sageLLM.codegen.kernel.rows import Affine, Load, Nest, RowProgram, Sweep
from sageLLM.codegen.model.op import OpDef, Operand

SUMS = "_sums"
"""The operand that represents the sums in the equations of the epilogue."""
MAX_GATES = 2
"""Sums that one element of an output may read: gate and up."""


@dataclass(frozen=True, slots=True)
class Gemm:
    """Rows of `x` times a weight of `gates` times as many features as the output has, and the epilogue of the sums.

    `groups` are the weight's dims before the last two: each group of rows has its own weight. With a `prologue`, `x`
    may be a value that it computes.
    """

    x: Operand
    w: Operand
    inner: Size
    groups: tuple[Size, ...]
    gates: int
    epilogue: Nest
    prologue: Prologue | None = None

    @property
    def loops(self) -> RowProgram:
        """The loops before and after the product."""
        return RowProgram((*([self.prologue.nest] if self.prologue else []), self.epilogue))

    @property
    def sweep(self) -> Sweep:
        (sweep,) = self.epilogue.sweeps
        return sweep

    def gate_of(self, load: Load) -> int:
        """The number of the gate that a load of SUMS reads."""
        return _gate(load.location.index[-1], self.sweep)


def gemm_of(op: OpDef, programs: Programs) -> Gemm | None:
    """The op as a GEMM, or None for any other op."""
    program = programs.of(op)
    dots = {one for s in program.statements for one in walk(s.value) if isinstance(one, Dot)} if program else set()
    if program is None or len(dots) != 1:
        return None
    dot = dots.pop()
    w = op.operand(dot.w.name) if isinstance(dot.w, Ref) else None
    if w is None or w not in op.inputs:
        return None
    try:
        split = split_at(dot, op, program, programs)
        if not _is_weight(w, split.x, dot):
            return None
        nest = _epilogue(split.rest, dot, programs)
        _check_inplace(op, split, nest)
    except LoweringError:
        return None
    return _gemm(split, w, dot, nest)


def _is_weight(w: Operand, x: Operand, dot: Dot) -> bool:
    """Whether `w` is stored row by output feature, both by the summed dim last."""
    return (
        len(w.type.dims) in (2, 3)
        and w.type.dims[-1] == x.type.dims[-1] == dot.dim
        and w.type.element == x.type.element not in DTYPES
        and w.type.dims[-2] not in x.type.dims
    )


def _epilogue(rest: OpDef, dot: Dot, programs: Programs) -> Nest:
    """The row program after the dot product: the same op with the sums as an operand."""
    program = rest.program
    assert program is not None, "the op after a product has equations"
    statements = tuple(Statement(s.target, _with_sums(s.value, dot)) for s in program.statements)
    summed = replace(
        rest,
        inputs=(*rest.inputs, Operand(SUMS, dot.type)),
        program=Program(program.views, statements),
    )
    nests = row_program(summed, programs).nests
    if len(nests) != 1 or len(nests[0].steps) != 1 or len(nests[0].sweeps) != 1:
        raise LoweringError("the epilogue must be one sweep along a row")
    return nests[0]


def _check_inplace(op: OpDef, split: Split, epilogue: Nest) -> None:
    """The product reads its activation input until the end; the prologue of a row is done before its epilogue."""
    if split.x.name in op.inplace.values():
        raise LoweringError(f"an output reuses the memory of '{split.x.name}', which the product reads")
    before = split.prologue.nest.steps if split.prologue else ()
    check_inplace(RowProgram((Nest(epilogue.rows, (*before, *epilogue.steps)),)), op.inplace)


def _with_sums(expr: Expr, dot: Dot) -> Expr:
    if expr == dot:
        return Ref(dot.type, SUMS)
    changed: dict[str, Any] = {
        field.name: _with_sums(value, dot)
        for field in fields(expr)
        if isinstance(value := getattr(expr, field.name), Expr)
    }
    return replace(expr, **changed) if changed else expr


def _gemm(split: Split, w: Operand, dot: Dot, nest: Nest) -> Gemm | None:
    sweep = nest.sweeps[0]
    gates = [_gate(load.location.index[-1], sweep) for load in _loads(sweep) if load.location.operand == SUMS]
    count = max(gates, default=-1) + 1
    if not 0 < count <= MAX_GATES or min(gates) < 0 or w.type.dims[-2] != sweep.loop.extent * Size.of(count):
        return None
    return Gemm(split.x, w, dot.dim, w.type.dims[:-2], count, nest, split.prologue)


def _gate(at: Affine, sweep: Sweep) -> int:
    """`at` is gate * features + the sweep's own position; -1 if it is something else."""
    if at.terms != Affine.of(sweep.loop.variable).terms:
        return -1
    return next((g for g in range(MAX_GATES) if at.offset == sweep.loop.extent * Size.of(g)), -1)


def _loads(sweep: Sweep) -> Iterator[Load]:
    for step in sweep.steps:
        yield from (one for one in walk(step.value) if isinstance(one, Load))
