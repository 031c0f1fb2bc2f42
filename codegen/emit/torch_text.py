"""Writes typed expressions as torch: one line per statement, with reshapes only where torch needs them.

Reductions keep their axis, so that the next line broadcasts without a reshape.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.codegen.emit.dim_text import leading_of
from sageLLM.codegen.emit.torch_layout import Layout, Piece, aligned, merged
from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.tree import (
    AttrRef,
    Binary,
    Cast,
    DimRef,
    Dot,
    Expr,
    Gather,
    IfPresent,
    Number,
    Reduce,
    Ref,
    Scan,
    Select,
    TopK,
    Unary,
    View,
)
from sageLLM.codegen.expr.types import INTEGERS, LITERALS, ValueType

TORCH_DTYPES = {"bool": "bool", "i8": "int8", "i32": "int32", "i64": "int64", "f16": "float16", "bf16": "bfloat16",
                "f32": "float32", "f64": "float64"}  # fmt: skip
_SCALAR = {"exp": "math.exp", "log": "math.log", "sqrt": "math.sqrt", "abs": "abs", "floor": "math.floor",
           "round": "round"}  # fmt: skip
_TENSOR = {"not": "torch.logical_not"}


@dataclass(slots=True)
class TorchText:
    """Writes the expressions of one kernel. `elements` maps an element variable to an operand of this type."""

    layouts: dict[str, Layout]
    elements: Mapping[str, str]
    lets: Mapping[str, Expr]

    def piece(self, expr: Expr) -> Piece:
        match expr:
            case Number(value=value):
                return Piece(repr(value), ())
            case AttrRef(name=name):
                return Piece(name, ())
            case DimRef(size=size):
                return Piece(f"({size})", ())
            case Ref(name=name):
                return Piece(name, self.layouts[name])
            case Unary():
                return self._unary(expr)
            case Binary():
                return self._binary(expr)
            case Select():
                return self._select(expr)
            case Cast():
                return self._cast(expr)
            case Reduce():
                return self._reduce(expr)
            case Scan():
                return self._scan(expr)
            case TopK():
                return self._top(expr)
            case Dot():
                return self._dot(expr)
            case Gather():
                return self._gather(expr)
            case IfPresent(name=name, a=a, b=b):
                return self._if_present(name, a, b, expr)
        raise AssertionError(f"{type(expr).__name__} must have a case above")

    # element by element

    def _unary(self, expr: Unary) -> Piece:
        x = self.piece(expr.x)
        if expr.op == "neg":
            return Piece(f"(-{x.text})", x.layout)
        if expr.type.is_literal or expr.x.type.is_literal:
            return Piece(f"(not {x.text})" if expr.op == "not" else f"{_SCALAR[expr.op]}({x.text})", ())
        return Piece(f"{_TENSOR.get(expr.op, 'torch.' + expr.op)}({x.text})", x.layout)

    def _binary(self, expr: Binary) -> Piece:
        if expr.op in ("min", "max"):
            return self._extreme(expr)
        a, b, layout = self._aligned(expr.a, expr.b, expr)
        element = expr.type.element
        if expr.op == "/" and expr.a.type.is_literal and element not in ("f32", "f64", *LITERALS):
            # torch computes `3 / x` as the rounded reciprocal times 3, which rounds a narrow type twice
            return Piece(f"({a} / ({b}).to(f32)).to({self.dtype(element)})", layout)
        op = {"and": "&", "or": "|"}.get(expr.op, expr.op)
        if expr.type.element == "truth":
            op = expr.op
        return Piece(f"({a} {op} {b})", layout)

    def _extreme(self, expr: Binary) -> Piece:
        if expr.type.is_literal:
            return Piece(f"{expr.op}({self.piece(expr.a).text}, {self.piece(expr.b).text})", ())
        if expr.a.type.is_literal or expr.b.type.is_literal:
            tensor, limit = (expr.b, expr.a) if expr.a.type.is_literal else (expr.a, expr.b)
            x, bound = self.piece(tensor), "max" if expr.op == "min" else "min"
            return Piece(f"({x.text}).clamp({bound}={self.piece(limit).text})", x.layout)
        a, b, layout = self._aligned(expr.a, expr.b, expr)
        return Piece(f"torch.{expr.op}imum({a}, {b})", layout)

    def _select(self, expr: Select) -> Piece:
        pieces = [self.piece(part) for part in (expr.condition, expr.a, expr.b)]
        if expr.condition.type.is_literal:
            a, b, layout = self._aligned(expr.a, expr.b, expr)
            return Piece(f"({a} if {pieces[0].text} else {b})", layout)
        joined = merged(pieces[0].layout, pieces[1].layout)
        joined = merged(joined, pieces[2].layout) if joined is not None else None
        if joined is None:
            joined = expr.type.dims
            pieces = [aligned(piece, joined) for piece in pieces]
        return Piece(f"torch.where({', '.join(piece.text for piece in pieces)})", joined)

    def _aligned(self, left: Expr, right: Expr, result: Expr) -> tuple[str, str, Layout]:
        a, b = self.piece(left), self.piece(right)
        layout = merged(a.layout, b.layout)
        if layout is not None:
            return a.text, b.text, layout
        dims = result.type.dims
        return aligned(a, dims).text, aligned(b, dims).text, dims

    def _if_present(self, name: str, a: Expr, b: Expr, expr: Expr) -> Piece:
        if isinstance(a, Number) and isinstance(b, Number) and (a.value, b.value) == (True, False):
            return Piece(f"({name} is not None)", ())
        with_it, without = self.piece(a), self.piece(b)
        if with_it.layout != without.layout and expr.type.dims and expr.type.element != "bool":
            with_it, without = aligned(with_it, expr.type.dims), aligned(without, expr.type.dims)
        layout = with_it.layout or without.layout
        return Piece(f"({with_it.text} if {name} is not None else {without.text})", layout)

    # element types

    def _cast(self, expr: Cast) -> Piece:
        fused = self._linear(expr)
        if fused is not None:
            return fused
        x, element = self.piece(expr.x), expr.type.element
        if element == expr.x.type.element:
            return x
        return Piece(f"({x.text}).to({self.dtype(element)})", x.layout)

    def dtype(self, element: str) -> str:
        """The torch dtype as text: `x.dtype` for a variable, `f32` for the wide float, else `torch.NAME`."""
        if element in self.elements:
            return f"{self.elements[element]}.dtype"
        return "f32" if element == "f32" else f"torch.{TORCH_DTYPES[element]}"

    # products

    def _linear(self, expr: Cast) -> Piece | None:
        """E(dot(x, w, K)), with or without a bias, as one library call that accumulates in float32 and rounds once."""
        bias, inner = self._bias_and_product(self._resolved(expr.x))
        if not isinstance(inner, Dot) or inner.x.type.element != expr.type.element:
            return None
        if bias is not None and bias.type.element != expr.type.element:
            return None
        return self._library_product(inner, bias)

    def _bias_and_product(self, value: Expr) -> tuple[Ref | None, Expr]:
        if isinstance(value, IfPresent):
            bias, product = self._bias_and_product(self._resolved(value.a))
            same = product == self._resolved(value.b)
            return (bias, product) if bias is not None and bias.name == value.name and same else (None, value)
        match value:
            case Binary(op="+", a=product, b=Cast(x=Ref() as bias)):
                return bias, self._resolved(product)
        return None, value

    def _resolved(self, value: Expr) -> Expr:
        return self.lets.get(value.name, value) if isinstance(value, Ref) else value

    def _library_product(self, dot: Dot, bias: Ref | None) -> Piece | None:
        x, w = self.piece(dot.x), self.piece(dot.w)
        is_matrix = len(w.layout) == 2 and w.layout[1] == dot.dim
        shared = set(x.layout) & set(w.layout)
        if not is_matrix or x.layout[-1:] != (dot.dim,) or shared != {dot.dim}:
            return None
        if bias is not None and self.layouts[bias.name] != w.layout[:1]:
            return None
        arguments = ", ".join([x.text, w.text, *([bias.name] if bias else [])])
        return Piece(f"torch.nn.functional.linear({arguments})", (*x.layout[:-1], w.layout[0]))

    def _dot(self, expr: Dot) -> Piece:
        wide = [_widened(operand, expr.type.element) for operand in (expr.x, expr.w)]
        found = self._library_product(Dot(expr.type, wide[0], wide[1], expr.dim), None)
        if found is not None:
            return found
        x, w = (aligned(self.piece(operand), operand.type.dims) for operand in wide)
        known = dict.fromkeys([*expr.x.type.dims, *expr.w.type.dims])
        letters = {dim: "..." if dim == LEADING else chr(ord("a") + i) for i, dim in enumerate(known)}
        terms = ["".join(letters[dim] for dim in dims) for dims in (expr.x.type.dims, expr.w.type.dims, expr.type.dims)]
        return Piece(f'torch.einsum("{terms[0]},{terms[1]}->{terms[2]}", {x.text}, {w.text})', expr.type.dims)

    # along dims

    def _reduce(self, expr: Reduce) -> Piece:
        x = self.piece(expr.x)
        axis = x.layout.index(expr.dim) - len(x.layout)
        layout = tuple(None if dim == expr.dim else dim for dim in x.layout)
        # torch sums integers in int64 if it is not told otherwise
        dtype = f", dtype={self.dtype(expr.type.element)}" if expr.op == "sum" and expr.type.element in INTEGERS else ""
        return Piece(f"({x.text}).{expr.op}({axis}, keepdim=True{dtype})", layout)

    def _scan(self, expr: Scan) -> Piece:
        x = self.piece(expr.x)
        axis = x.layout.index(expr.dim) - len(x.layout)
        if expr.op in ("cummax", "cummin"):
            return Piece(f"({x.text}).{expr.op}({axis}).values", x.layout)
        element = expr.type.element
        dtype = f", dtype={self.dtype(element)}" if element in INTEGERS else ""
        return Piece(f"({x.text}).{expr.op}({axis}{dtype})", x.layout)

    def _top(self, expr: TopK) -> Piece:
        """By a stable sort, because torch.topk does not define the order of equal elements."""
        x = self.piece(expr.x)
        axis = x.layout.index(expr.dim) - len(x.layout)
        text = f"({x.text}).sort(dim={axis}, descending=True, stable=True).{expr.part}.narrow({axis}, 0, {expr.k})"
        layout = tuple(expr.k if dim == expr.dim else dim for dim in x.layout)
        return Piece(f"{text}.to(torch.int32)" if expr.part == "indices" else text, layout)

    def _gather(self, expr: Gather) -> Piece:
        table = aligned(self.piece(expr.table), expr.table.type.dims)
        index = aligned(self.piece(expr.index), expr.index.type.dims)
        axis = expr.table.type.dims.index(expr.dim)
        if len(expr.index.type.dims) == 1:  # several times faster than indexing
            return Piece(f"({table.text}).index_select({axis}, {index.text})", expr.type.dims)
        before = ":, " * axis
        return Piece(f"({table.text})[{before}{index.text}]", expr.type.dims)


def _widened(operand: Expr, element: str) -> Expr:
    if operand.type.element == element:
        return operand
    return Cast(ValueType(element, operand.type.dims), operand)


def view_text(view: View) -> str:
    """`gu[..., :I]` or `qkv[:, :Nq * D].reshape(T, Nq, D)`."""
    parts = []
    for cut, dim in zip(view.slices, view.base_type.dims, strict=True):
        if cut is None:
            parts.append("..." if dim == LEADING else ":")
        else:
            start = "" if cut.start == Size.of(0) else str(cut.start)
            stop = "" if cut.stop == dim else str(cut.stop)
            parts.append(f"{start}:{stop}" if cut.step == Size.of(1) else f"{start}:{stop}:{cut.step}")
    while parts and parts[-1] == ":" and "..." not in parts:
        parts.pop()
    text = view.base + (f"[{', '.join(parts)}]" if any(view.slices) else "")
    if view.shape is None:
        return text
    leading = f"*{leading_of(view.base, len(view.base_type.dims) - 1)}"
    dims = ", ".join(leading if dim == LEADING else str(dim) for dim in view.shape)
    return f"{text}.reshape({dims or '()'})"
