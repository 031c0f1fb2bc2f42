"""Emits a GEMM of few rows with the equations before and after it, such as a norm, a projection and its gate.

ms = mean of h * h, block by block                                               the prologue, in every program
acc += dot(rows, rows of w); acc_1 += dot(rows, rows I + n of w)                 one sum for each gate
y[i_R, i_I] := E(acc * sigmoid(acc) * acc_1)                                     the equations, on tiles in registers

`rows` are loaded, or computed by the last sweep of the prologue. More rows are computed by the kernels of the fused
ops, one after another: the library multiplies faster then.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sageLLM.codegen.emit.dim_text import tidy
from sageLLM.codegen.emit.reference import attr_text
from sageLLM.codegen.emit.triton_launch import arguments_of, sizes_and_operands
from sageLLM.codegen.emit.triton_names import block_name, inside_name, size_text
from sageLLM.codegen.emit.triton_rows import RowKernel
from sageLLM.codegen.expr.tree import Expr, walk
from sageLLM.codegen.kernel.gemm import SUMS, Gemm, gemm_of
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.names import OwnNames, own_names, stride_name
from sageLLM.codegen.kernel.rows import Let, Load, Location, Loop, Nest, Reduction, Store, Sweep
from sageLLM.codegen.model.op import Call, OpDef, Template

VARIABLES = ("m", "n", "k", "gate", "is_first", "is_weight", "rows", "weights", "start")
"""Variables of the kernel in the template, besides the sums."""
OWN = (*VARIABLES, "acc", "acc_1", "use", "memory", "strides", "codes")


class EpilogueKernel(RowKernel):
    """The lines of the epilogue, on tiles [BLOCK_M, BLOCK_N]; the sums are the variables `acc` and `acc_1`."""

    reserved = VARIABLES

    def __init__(self, op: OpDef, gemm: Gemm, own: OwnNames) -> None:
        self.gemm = gemm
        super().__init__(op, gemm.epilogue, own, whole=True)

    def _write(self) -> None:
        self._columns(self.gemm.sweep.loop)
        self.lines = []  # the template has the columns
        for step in self.gemm.sweep.steps:
            self._in_sweep(step, self.gemm.sweep.loop)
        self.lines = [line for line in self.lines if line not in ("acc = acc", "acc_1 = acc_1")]  # sums named as here

    def _load_early(self, loop: Loop) -> None:
        """Loads what the epilogue reads after the products, where it needs no registers during them."""

    def _leaf(self, expr: Expr) -> str:
        if isinstance(expr, Load) and expr.location.operand == SUMS:
            return "acc_1" if self.gemm.gate_of(expr) else "acc"
        return super()._leaf(expr)


class PrologueKernel(RowKernel):
    """The lines of the prologue before the product, and in `rows` those in its loop, which compute the rows.

    Every program computes its rows, and the programs of the first columns store those that are outputs.
    """

    rows_block, reserved = "BLOCK_M", VARIABLES

    def __init__(self, op: OpDef, gemm: Gemm, nest: Nest, own: OwnNames) -> None:
        self.gemm = gemm
        self.rows: list[str] = []
        super().__init__(op, nest, own, whole=False)

    def _write(self) -> None:
        *before, last = self.nest.steps
        for step in before:
            self._step(step)
        assert isinstance(last, Sweep), "the last step of a prologue computes the rows"
        self.rows = self._body(last, self.own("start"))

    def _sweep(self, sweep: Sweep) -> None:
        self._looped(sweep)

    def _store(self, store: Store) -> None:
        operand = store.location.operand
        if operand == self.gemm.x.name:
            value = tidy(self._text(store.value))
            self._put(f"rows = ({value}).to({self._like_weight()}.dtype.element_ty)")
        if operand in self._operands:
            super()._store(store)

    def _like_weight(self) -> str:
        """An operand of the weight's element type; the weight itself may be bytes of codes."""
        w = self.gemm.w
        others = [o for o in self.op.inputs if o.name != w.name]
        return next(o.name for o in (*others, w) if o.type.element == w.type.element)

    def _store_mask(self, location: Location) -> str:
        return f"{super()._store_mask(location)} & is_first"


@dataclass(frozen=True, slots=True)
class EpilogueView:
    """View of an op in `triton_epilogue.py.jinja`. `calls` are the fused ops as calls, `callees` their names."""

    x: str
    w: str
    configuration: str  # the name under which targets have the constants
    block: str  # BLOCK_K
    prologue: tuple[str, ...]
    rows: tuple[str, ...]
    stores_rows: bool
    gates: int
    elements: tuple[str, ...]
    row: str  # i_R
    column: str  # i_I
    inside: str  # in_I
    is_row: str
    x_row: str
    rows_of_x: str
    num_rows: str
    num_columns: str
    inner: str
    lines: tuple[str, ...]
    numbers: tuple[tuple[str, str], ...]  # parameters and their arguments
    constants: tuple[str, ...]
    setup: tuple[str, ...]
    calls: tuple[str, ...]
    callees: tuple[str, ...]
    result: str


def epilogue_view(op: OpDef, programs: Programs) -> EpilogueView | None:
    """None for an op that is not a GEMM with equations around it, or that has names of the template."""
    gemm = gemm_of(op, programs) if op.fuses else None
    if gemm is None or not _fits(op, gemm, programs):
        return None
    own = own_names(op)
    kernel = EpilogueKernel(op, gemm, own)
    prologue = PrologueKernel(op, gemm, gemm.prologue.recomputed(programs), own) if gemm.prologue else None
    before, rows = (prologue.lines, prologue.rows) if prologue else ([], [])
    lines = [*before, *rows, *kernel.lines]
    numbers, constants = _parameters(op, gemm, lines, kernel.rows_text, own)
    x = gemm.x if prologue is None else next(o for o in op.inputs if o.type.dims[:-1] == gemm.x.type.dims[:-1])
    return EpilogueView(
        x=gemm.x.name,
        w=gemm.w.name,
        configuration="row_prologue" if prologue else "linear",
        block=block_name(prologue.nest.sweeps[-1].loop) if prologue else "BLOCK_K",
        prologue=tuple(before),
        rows=tuple(rows),
        stores_rows=any("is_first" in line for line in (*before, *rows)),
        gates=gemm.gates,
        elements=tuple(
            f"{element}: tl.constexpr = {operand}.dtype.element_ty"
            for element, operand in op.element_inputs.items()
            if any(f", {element})" in line for line in lines)
        ),
        row=gemm.epilogue.rows[0].variable,
        column=gemm.sweep.loop.variable,
        inside=inside_name(gemm.sweep.loop),
        is_row=own("is_row"),
        x_row=stride_name(gemm.x, 0),
        rows_of_x=f"{x.name}.shape[:-1].numel()",
        num_rows=kernel.rows_text,
        num_columns=size_text(gemm.sweep.loop.extent),
        inner=size_text(gemm.inner),
        lines=tuple(kernel.lines),
        numbers=numbers,
        constants=constants,
        setup=tuple(sizes_and_operands(op, own)),
        calls=tuple(_calls(op)),
        callees=tuple(dict.fromkeys(call.op for call in op.fuses)),
        result=", ".join(o.name for o in op.outputs),
    )


def template_of(op: OpDef, programs: Programs) -> Template | None:
    """The template of the GEMM that an op fuses with others."""
    for inner in (programs.ops[call.op] for call in op.fuses):
        found = inner.triton or template_of(inner, programs)
        if found is not None:
            return found
    return None


def _fits(op: OpDef, gemm: Gemm, programs: Programs) -> bool:
    """Whether the template can compute the op: one weight, single sizes, none of the template's names."""
    is_plain = not gemm.groups and len(gemm.epilogue.rows) == 1
    sizes = (size_text(gemm.sweep.loop.extent), size_text(gemm.inner))
    own, targets = own_names(op), {name for call in op.fuses for name in call.targets}
    has_own_names = any(own(name) != name for name in OWN) or targets & set(OWN)
    if not is_plain or has_own_names or not all(map(str.isidentifier, sizes)) or template_of(op, programs) is None:
        return False
    if {o.name for o in op.outputs} > targets:
        return False
    return gemm.prologue is None or _prologue_fits(op, gemm, gemm.prologue.recomputed(programs))


def _prologue_fits(op: OpDef, gemm: Gemm, nest: Nest) -> bool:
    """Whether several programs can compute the prologue: none reads what another one stores."""
    *_, last = nest.steps
    inside = [step for sweep in nest.sweeps for step in sweep.steps]
    stored = {step.location.operand for step in (*nest.steps, *inside) if isinstance(step, Store)} - {gemm.x.name}
    ends = isinstance(last, Sweep) and any(
        isinstance(step, Store) and step.location.operand == gemm.x.name for step in last.steps
    )
    is_along_rows = all(sweep.loop.extent == gemm.inner for sweep in nest.sweeps)
    is_simple = all(isinstance(step, Let | Reduction | Store) for step in inside)
    is_overwritten = stored & op.inplace.keys() or _loaded(nest) & set(op.inplace.values())
    has_rows = any(o.type.dims[:-1] == gemm.x.type.dims[:-1] for o in op.inputs)
    return (
        bool(ends and is_along_rows and is_simple and has_rows)
        and not is_overwritten
        and not (_loaded(gemm.epilogue) & {o.name for o in op.outputs})
    )


def _loaded(nest: Nest) -> set[str]:
    """The operands that the loop loads."""
    steps = [*nest.steps, *(step for sweep in nest.sweeps for step in sweep.steps)]
    values = [step.value for step in steps if not isinstance(step, Sweep)]
    return {one.location.operand for value in values for one in walk(value) if isinstance(one, Load)}


def _parameters(
    op: OpDef, gemm: Gemm, lines: Sequence[str], rows: str, own: OwnNames
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """What the kernel takes at run time, with the arguments, and the sizes that it is compiled for."""
    text, every = "\n".join(lines), arguments_of(op, own)
    read = [name for name in every if re.search(rf"\b{name}\b", text)]
    x = () if gemm.prologue else (gemm.x.name,)
    names = dict.fromkeys([*x, gemm.w.name, *read, *(stride_name(gemm.x, 0) for _ in x), rows])
    sizes = dict.fromkeys([size_text(gemm.sweep.loop.extent), size_text(gemm.inner)])
    sizes |= {name: None for name in names if name in op.symbols and name != rows}
    every = {**every, gemm.w.name: "memory"}
    return tuple((name, every.get(name, name)) for name in names if name not in sizes), tuple(sizes)


def _calls(op: OpDef) -> Iterator[str]:
    """The fused ops one after another, and the return of the outputs."""
    *before, last = op.fuses
    yield from (f"{', '.join(call.targets)} = {_call(call)}" for call in before)
    outputs = tuple(o.name for o in op.outputs)
    if last.targets == outputs:
        yield f"return {_call(last)}"
    else:
        yield f"{', '.join(last.targets)} = {_call(last)}"
        yield f"return {', '.join(outputs)}"


def _call(call: Call) -> str:
    """`linear(x, w, bias)`."""
    texts = [*(arg or "None" for arg in call.args), *(f"{name}={attr_text(value)}" for name, value in call.kwargs)]
    return f"{call.op}({', '.join(texts)})"
