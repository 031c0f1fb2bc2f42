"""Emits a GEMM of few rows with the equations after it as its epilogue, such as a projection and its gate.

acc += dot(rows of x, rows of w); acc_1 += dot(rows of x, rows I + n of w)      one sum for each gate
y[i_R, i_I] := E(acc * sigmoid(acc) * acc_1)                                     the equations, on tiles in registers

More rows are computed by the kernels of the fused ops, one after another: the library multiplies faster then.
"""

import re
from dataclasses import dataclass

from sageLLM.codegen.emit.reference import attr_text
from sageLLM.codegen.emit.triton_launch import arguments_of, sizes_and_operands
from sageLLM.codegen.emit.triton_names import inside_name
from sageLLM.codegen.emit.triton_rows import RowKernel, size_text
from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.kernel.gemm import SUMS, Gemm, gemm_of
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.names import OwnNames, own_names, stride_name
from sageLLM.codegen.kernel.rows import Load, Loop
from sageLLM.codegen.model.op import Call, OpDef

OWN = ("m", "n", "k", "acc", "acc_1", "rows", "weights", "start", "use")
"""Variables of the template."""


class EpilogueKernel(RowKernel):
    """The lines of the epilogue, on tiles [BLOCK_M, BLOCK_N]; the sums are the variables `acc` and `acc_1`."""

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


@dataclass(frozen=True, slots=True)
class EpilogueView:
    """View of an op in `triton_epilogue.py.jinja`. `calls` are the fused ops as calls, `callees` their names."""

    x: str
    w: str
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
    """None for an op that is not a GEMM and its epilogue, or that has names of the template."""
    gemm = gemm_of(op, programs) if op.fuses else None
    if gemm is None or not _fits(op, gemm, programs):
        return None
    own = own_names(op)
    kernel = EpilogueKernel(op, gemm, own)
    columns, inner = size_text(gemm.sweep.loop.extent), size_text(gemm.inner)
    numbers, constants = _parameters(op, gemm, kernel, own)
    *before, last = op.fuses
    return EpilogueView(
        x=gemm.x.name,
        w=gemm.w.name,
        gates=gemm.gates,
        elements=tuple(
            f"{element}: tl.constexpr = {operand}.dtype.element_ty"
            for element, operand in op.element_inputs.items()
            if any(f", {element})" in line for line in kernel.lines)
        ),
        row=gemm.epilogue.rows[0].variable,
        column=gemm.sweep.loop.variable,
        inside=inside_name(gemm.sweep.loop),
        is_row=own("is_row"),
        x_row=stride_name(gemm.x, 0),
        rows_of_x=f"{gemm.x.name}.shape[:-1].numel()",
        num_rows=kernel.rows_text,
        num_columns=columns,
        inner=inner,
        lines=tuple(kernel.lines),
        numbers=numbers,
        constants=constants,
        setup=tuple(sizes_and_operands(op, own)),
        calls=(*(f"{', '.join(call.targets)} = {_call(call)}" for call in before), f"return {_call(last)}"),
        callees=tuple(dict.fromkeys(call.op for call in op.fuses)),
        result=", ".join(o.name for o in op.outputs),
    )


def _fits(op: OpDef, gemm: Gemm, programs: Programs) -> bool:
    """Whether the template can compute the op: one weight, no prologue, single sizes, none of its own names."""
    is_plain = gemm.prologue is None and not gemm.groups and len(gemm.epilogue.rows) == 1
    sizes = (size_text(gemm.sweep.loop.extent), size_text(gemm.inner))
    own, targets = own_names(op), {name for call in op.fuses for name in call.targets}
    has_own_names = any(own(name) != name for name in OWN) or targets & set(OWN)
    is_result = tuple(o.name for o in op.outputs) == op.fuses[-1].targets
    has_template = programs.ops[op.fuses[0].op].triton is not None
    return is_plain and is_result and has_template and not has_own_names and all(map(str.isidentifier, sizes))


def _parameters(
    op: OpDef, gemm: Gemm, kernel: EpilogueKernel, own: OwnNames
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """What the kernel takes at run time, with the arguments, and the sizes that it is compiled for."""
    text, every, rows = "\n".join(kernel.lines), arguments_of(op, own), kernel.rows_text
    read = [name for name in every if re.search(rf"\b{name}\b", text)]
    names = dict.fromkeys([gemm.x.name, gemm.w.name, *read, stride_name(gemm.x, 0), rows])
    sizes = dict.fromkeys([size_text(gemm.sweep.loop.extent), size_text(gemm.inner)])
    sizes |= {name: None for name in names if name in op.symbols and name != rows}
    return tuple((name, every.get(name, name)) for name in names if name not in sizes), tuple(sizes)


def _call(call: Call) -> str:
    """`linear(x, w, bias)`."""
    texts = [*(arg or "None" for arg in call.args), *(f"{name}={attr_text(value)}" for name, value in call.kwargs)]
    return f"{call.op}({', '.join(texts)})"
