"""Row prologues: the equations before the product of a GEMM, computed once per row.

    rms_linear:  n = rms_norm(x, w)     rows i_R: sweeps over K, which store n[i_R, i_K]
                 y = linear(n, m)       a GEMM with n as its activation input

Without one, every output feature would compute its row of `n` again. Outputs that do not depend on the product, such as
the sum of a residual add, belong to the prologue; the epilogue reads them.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from sageLLM.codegen.expr.tree import Dot, Program, Ref, Statement, walk
from sageLLM.codegen.kernel.indexing import LoweringError
from sageLLM.codegen.kernel.inline import Programs, unused_name
from sageLLM.codegen.kernel.lower import row_program
from sageLLM.codegen.kernel.rows import Location, Nest
from sageLLM.codegen.kernel.scatter import Scatter
from sageLLM.codegen.model.op import OpDef, Operand

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prologue:
    """The loop over rows before the product. `in_scratch`: its result is no output, and needs scratch memory.

    `op` has the equations of the loop and nothing else.
    """

    nest: Nest
    in_scratch: bool
    op: OpDef

    def recomputed(self, programs: Programs) -> Nest:
        """The loop for targets where several programs compute a row: no sweep loads what another one stores."""
        return row_program(self.op, programs, reloads=False).nests[0]


@dataclass(frozen=True, slots=True)
class Split:
    """An op cut at its product: the activation input, the loop that computes it, and the op that is left.

    Outputs of the prologue are inputs of `rest`.
    """

    x: Operand
    prologue: Prologue | None
    rest: OpDef


def split_at(dot: Dot, op: OpDef, program: Program, programs: Programs) -> Split:
    """Cuts the op. Raises LoweringError if the equations before the product are not one loop over its rows."""
    after = _depending_on(dot, program)
    bases = {view.name: view.base for view in program.views}
    first = tuple(s for s in program.statements if s.target not in after)
    written = {bases.get(s.target, s.target) for s in first}
    outputs = tuple(o for o in op.outputs if o.name in written)
    if any(o.name in after for o in outputs):
        raise LoweringError("an output combines values from before and after the product")
    x, first = _activation(dot, op, program, first)
    in_scratch = op.operand(x.name) is None
    is_first = {o.name for o in outputs}
    kept = tuple(s for s in program.statements if bases.get(s.target, s.target) not in is_first)
    rest = replace(
        op,
        inputs=(*op.inputs, *outputs),
        outputs=tuple(o for o in op.outputs if o.name not in is_first),
        program=Program(program.views, kept),
        fuses=(),
    )
    if not outputs and not in_scratch:
        return Split(x, None, rest)
    stored = (*outputs, *([x] if in_scratch else []))
    before = replace(op, outputs=stored, program=Program(program.views, first), fuses=())
    before = replace(before, inplace={name: of for name, of in op.inplace.items() if name in is_first})
    return Split(x, Prologue(_loop(before, x, programs), in_scratch, before), rest)


def _depending_on(dot: Dot, program: Program) -> set[str]:
    """The values and views that depend on the product, and the outputs that such values are parts of."""
    found: set[str] = set()
    for statement in program.statements:
        found |= {view.name for view in program.views if view.base in found}
        if any(one == dot or (isinstance(one, Ref) and one.name in found) for one in walk(statement.value)):
            view = program.view(statement.target)
            found |= {statement.target, view.base} if view else {statement.target}
    return found | {view.name for view in program.views if view.base in found}


def _activation(
    dot: Dot, op: OpDef, program: Program, first: tuple[Statement, ...]
) -> tuple[Operand, tuple[Statement, ...]]:
    """The activation input, and the statements with one that computes it if it is not a named value yet."""
    name = dot.x.name if isinstance(dot.x, Ref) else ""
    known = op.operand(name)
    if known is not None:
        return known, first
    if name in {s.target for s in first}:
        return Operand(name, dot.x.type), first
    name = unused_name(f"{name or 'x'}_rows", _names(op, program))
    return Operand(name, dot.x.type), (*first, Statement(name, dot.x))


def _names(op: OpDef, program: Program) -> Collection[str]:
    declared = {one.name for one in (*op.inputs, *op.outputs)} | {attr.name for attr in op.attrs}
    return declared | {view.name for view in program.views} | {s.target for s in program.statements}


def _loop(before: OpDef, x: Operand, programs: Programs) -> Nest:
    assert before.program is not None, "the op before a product has equations"
    if any(isinstance(s, Scatter) for s in before.program.statements):
        raise LoweringError("it stores to the paged cache before the product")
    nests = row_program(before, programs).nests
    if len(nests) != 1 or tuple(loop.extent for loop in nests[0].rows) != x.type.dims[:-1]:
        raise LoweringError("the equations before the product must be one loop over its rows")
    return nests[0]


def within_row(value: T, operand: str, row: str = "") -> T:
    """The steps with all locations of the operand relative to its row, which has the name `row`, if given."""
    changed: Any = value
    if isinstance(value, Location):
        changed = Location(row or operand, value.index[-1:]) if value.operand == operand else value
    elif isinstance(value, tuple):
        changed = tuple(within_row(one, operand, row) for one in value)
    elif is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: getattr(value, f.name) for f in fields(value)}
        changed = replace(value, **{name: within_row(one, operand, row) for name, one in inside.items()})
    return changed  # type: ignore[no-any-return]
