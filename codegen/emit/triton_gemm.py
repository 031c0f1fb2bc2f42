"""Reads a compute that is one GEMM, such as `y = E(dot(x, w, K) + f32(bias))`, for the template `linear`."""

import re

from sageLLM.codegen.diagnostics import Diagnostic, SpecErrors
from sageLLM.codegen.emit.dim_text import tidy
from sageLLM.codegen.emit.torch_text import TORCH_DTYPES
from sageLLM.codegen.emit.triton_text import TritonText
from sageLLM.codegen.expr.tree import Cast, Dot, Expr, Program, Ref, walk
from sageLLM.codegen.model.op import OpDef, Operand


def gemm_view(op: OpDef) -> dict[str, object]:
    """The operands of the GEMM by their roles, and its epilogue."""
    dot = _gemm(op)
    x, w, y = _input(op, dot.x), _input(op, dot.w), op.outputs[0]
    is_by_head = len(w.type.dims) == 3
    if x.type.dims[-1] != dot.dim or w.type.dims[-1] != dot.dim or y.type.dims[-1] != w.type.dims[-2]:
        raise _refused(op, f"the template `linear` sums over the last dims of {x.name} and {w.name}")
    if is_by_head and (len(x.type.dims) != 3 or x.type.dims[1] != w.type.dims[0]):
        raise _refused(op, f"the template `linear` requires a dim {w.type.dims[0]} of {x.name}, as of {w.name}")
    epilogue = _Epilogue(op, dot)
    text = tidy(epilogue.text())
    return {
        "x": x.name, "w": w.name, "y": y.name, "extra": epilogue.loaded,
        "elements": rounded_types(op, text), "epilogue": text,
        "arguments": ", ".join(o.name for o in op.inputs),
        "rows": f"{x.name}.shape[0]" if is_by_head else f"{x.name}.shape[:-1].numel()",
        "shape": f"M, {x.name}.shape[1], N" if is_by_head else f"*{x.name}.shape[:-1], N",
        "dtype": f"{x.name}.dtype" if y.type.element == x.type.element else f"torch.{TORCH_DTYPES[y.type.element]}",
        "x_rows": x.name if is_by_head else f"{x.name}.reshape(M, K)",
        "y_rows": y.name if is_by_head else f"{y.name}.view(M, N)",
        "heads": f"{x.name}.shape[1]" if is_by_head else "1",
        "x_head": f"{x.name}.stride(1)" if is_by_head else "0",
        "w_head": "strides[0]" if is_by_head else "0",
        "y_head": f"{y.name}.stride(1)" if is_by_head else "0",
    }  # fmt: skip


def rounded_types(op: OpDef, text: str) -> dict[str, str]:
    """The element variables that the text rounds to, each with an operand of that type."""
    return {name: operand for name, operand in op.element_inputs.items() if re.search(rf"\b{name}\b", text)}


def _gemm(op: OpDef) -> Dot:
    assert op.program is not None, "only computed ops have a GEMM"
    found = [node for statement in op.program.statements for node in walk(statement.value) if isinstance(node, Dot)]
    if len(found) != 1 or len(op.outputs) != 1 or op.program.views:
        raise _refused(op, "the template `linear` requires a compute of one dot without views")
    return found[0]


def _input(op: OpDef, side: Expr) -> Operand:
    """The operand on one side of the dot; a cast to float32 changes no product."""
    inner = side.x if isinstance(side, Cast) and side.type.element == "f32" else side
    operand = op.operand(inner.name) if isinstance(inner, Ref) else None
    if operand is None or operand.optional:
        raise _refused(op, "the template `linear` requires both sides of the dot to be inputs")
    return operand


class _Epilogue:
    """Writes the epilogue: what becomes of the sums in the tile `acc` [rows, columns]."""

    def __init__(self, op: OpDef, dot: Dot) -> None:
        assert op.program is not None, "only computed ops have a GEMM"
        self.op, self.dot, self.program = op, dot, op.program
        self.loaded: list[str] = []
        self._text = TritonText(self._leaf)

    def text(self) -> str:
        return self._text(self._value(self.op.outputs[0].name, self.program))

    def _value(self, name: str, program: Program) -> Expr:
        return next(statement.value for statement in program.statements if statement.target == name)

    def _leaf(self, expr: Expr) -> str:
        if expr == self.dot:
            return "acc"
        assert isinstance(expr, Ref), f"no text for {type(expr).__name__} in an epilogue"
        operand = self.op.operand(expr.name)
        if operand is None:
            return self._text(self._value(expr.name, self.program))
        if operand.type.dims != self.op.outputs[0].type.dims[-1:]:
            raise _refused(
                self.op,
                f"the template `linear` requires the dims of {operand.name} to be [{self.op.outputs[0].type.dims[-1]}]",
            )
        self.loaded += [operand.name] if operand.name not in self.loaded else []
        return f"tl.load({operand.name} + n, mask=n < N, other=0.0).to(tl.float32)[None, :]"


def _refused(op: OpDef, message: str) -> SpecErrors:
    help = "correct the op, or remove `kernel.triton`: a GPU then runs the reference"
    return SpecErrors([Diagnostic("SAGE124", message, op.entry.key_span("kernel", "triton"), help)])
