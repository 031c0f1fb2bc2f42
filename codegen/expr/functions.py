"""Type-checks calls of the compute language's functions."""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.operand_types import FROM_CONDITION, OperandTypes, kind_words
from sageLLM.codegen.expr.remedies import REMEDIES
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.size import LEADING, Size, is_never_negative
from sageLLM.codegen.expr.syntax import Text
from sageLLM.codegen.expr.tree import (
    Binary,
    BinaryOp,
    Cast,
    DimRef,
    Dot,
    Expr,
    Gather,
    IfPresent,
    Number,
    Reduce,
    ReduceOp,
    Scan,
    ScanOp,
    Select,
    TopK,
    TopPart,
    Unary,
    UnaryOp,
)
from sageLLM.codegen.expr.types import DTYPES, INTEGERS, ValueType, size_of

UNARY = ("exp", "log", "sqrt", "rsqrt", "sigmoid", "tanh", "erf", "abs", "relu", "floor", "round")
REDUCTIONS = ("sum", "mean", "amax", "amin")
SCANS = ("cumsum", "cumprod", "cummax", "cummin")
TOPS: dict[str, TopPart] = {"topk": "values", "topk_indices": "indices"}
FORMS = ("dot", "gather", "where", "min", "max", "optional", "present")
FUNCTIONS = (*UNARY, *REDUCTIONS, *SCANS, *TOPS, *FORMS, *DTYPES)
_SCALAR_FUNCTIONS = ("exp", "log", "sqrt", "abs", "floor", "round")


@dataclass(frozen=True, slots=True)
class FunctionChecker:
    """Checks the calls in one text. `expr` checks an argument, `expr_with` one where an optional name is present."""

    text: Text
    scope: Scope
    types: OperandTypes
    expr: Callable[[ast.expr], Expr]
    expr_with: Callable[[ast.expr, str], Expr]

    def call(self, node: ast.Call, name: str) -> Expr:
        """The typed tree of a call; raises Refused after a finding."""
        if node.keywords:
            message = f"{name}: keyword arguments are not supported"
            raise self.text.refuse("SAGE106", message, node.keywords[0], "pass it by position")
        if name in self.scope.elements or name in DTYPES:
            return self._cast(node, name)
        if name in UNARY:
            return self._unary_function(node, cast(UnaryOp, name))
        if name in REDUCTIONS:
            return self._reduction(node, cast(ReduceOp, name))
        if name in SCANS:
            return self._scan(node, cast(ScanOp, name))
        if name in TOPS:
            return self._top(node, name)
        forms: dict[str, Callable[[ast.Call], Expr]] = {
            "dot": self._dot,
            "gather": self._gather,
            "where": self._where,
            "min": self._extreme,
            "max": self._extreme,
            "optional": self._optional,
            "present": self._present,
        }
        if name not in forms:
            help = REMEDIES.get(name) or did_you_mean(name, [*FUNCTIONS, *self.scope.elements], is_closed=True)
            raise self.text.refuse("SAGE105", f"unknown function '{name}'", node.func, help)
        return forms[name](node)

    def _arguments(self, node: ast.Call, form: str) -> list[ast.expr]:
        count = form.count(",") + 1
        if len(node.args) != count:
            expected = f"{count} argument{'s' if count > 1 else ''}"
            message = f"{form}: expected {expected}, got {len(node.args)}"
            raise self.text.refuse("SAGE106", message, node, f"write {form}")
        return node.args

    def _cast(self, node: ast.Call, element: str) -> Expr:
        (argument,) = self._arguments(node, f"{element}(v)")
        x = self.expr(argument)
        if element in self.scope.unbound:
            message = f"{element} must be determined by a required input"
            help = f"use {element} in the type of a required input, or cast to a fixed type such as f32"
            raise self.text.refuse("SAGE132", message, node.func, help)
        if x.type.is_literal:
            message = "a literal must not be cast; it adopts the element type of the other operand"
            raise self.text.refuse("SAGE107", message, argument, "remove the cast")
        if x.type.element == "bool" or element == "bool":
            help = "write a comparison: x != 0" if element == "bool" else FROM_CONDITION
            raise self.text.refuse("SAGE107", "conditions and numbers must not be cast to each other", argument, help)
        return Cast(ValueType(element, x.type.dims), x)

    def _unary_function(self, node: ast.Call, name: UnaryOp) -> Expr:
        (argument,) = self._arguments(node, f"{name}(v)")
        x = self.expr(argument)
        self.types.require_number(x, argument)
        if x.type.is_literal:
            if name not in _SCALAR_FUNCTIONS:
                message = f"{name}: expected a tensor, got {kind_words(x)}"
                raise self.text.refuse("SAGE107", message, argument, "apply it to an operand of the op")
            return Unary(ValueType("float"), name, x)
        if name not in ("abs", "relu") and not self.scope.is_float(x.type.element):
            message = f"{name}: expected floats, got {x.type.element}"
            raise self.text.refuse("SAGE107", message, argument, "cast it: f32(...)")
        return Unary(x.type, name, x)

    def _reduction(self, node: ast.Call, name: ReduceOp) -> Expr:
        argument, dim_node = self._arguments(node, f"{name}(v, DIM)")
        x, dim = self.expr(argument), self._dim(dim_node)
        self.types.require_number(x, argument)
        self._require_dim(x, dim, dim_node, name)
        self._require_wide(x, argument, name)
        return Reduce(ValueType(x.type.element, _without(x.type.dims, dim)), name, x, dim)

    def _scan(self, node: ast.Call, name: ScanOp) -> Expr:
        argument, dim_node = self._arguments(node, f"{name}(v, DIM)")
        x, dim = self.expr(argument), self._dim(dim_node)
        self.types.require_number(x, argument)
        self._require_dim(x, dim, dim_node, name)
        self._require_wide(x, argument, name)
        return Scan(x.type, name, x, dim)

    def _top(self, node: ast.Call, name: str) -> Expr:
        argument, dim_node, k_node = self._arguments(node, f"{name}(v, DIM, K)")
        x, dim, k = self.expr(argument), self._dim(dim_node), self._dim(k_node)
        self.types.require_number(x, argument)
        self._require_dim(x, dim, dim_node, name)
        if k in _without(x.type.dims, dim):
            message = (
                f"{name}: the number {k} must not be another dim of the operand, [{', '.join(map(str, x.type.dims))}]"
            )
            raise self.text.refuse("SAGE113", message, k_node, "declare a dim for the number of elements")
        if not is_never_negative(dim - k, self.scope.known) or k.constant == 0:
            help = f'add `where: ["{k} <= {dim}"]`'
            raise self.text.refuse("SAGE117", f"{name}: {k} must be at most {dim}", k_node, help)
        at = x.type.dims.index(dim)
        dims = (*x.type.dims[:at], k, *x.type.dims[at + 1 :])
        element = x.type.element if TOPS[name] == "values" else "i32"
        return TopK(ValueType(element, dims), TOPS[name], x, dim, k)

    def _require_wide(self, x: Expr, argument: ast.expr, name: str) -> None:
        """Refuses sums and products of narrow types."""
        # A sum of f16 or bf16 would round after every addition, in an order that differs between targets.
        if name in ("sum", "mean", "cumsum", "cumprod") and x.type.element not in ("f32", "f64", "i32", "i64"):
            message = f"{name}: expected f32, f64, i32 or i64, got {x.type.element}, which may be narrow"
            wide = "i32" if x.type.element == "i8" else "f32"
            raise self.text.refuse("SAGE107", message, argument, f"accumulate in {wide}: {wide}(...)")
        if name == "mean" and x.type.element in INTEGERS:
            message = f"mean: expected floats, got {x.type.element}"
            raise self.text.refuse("SAGE107", message, argument, "cast it: f32(...)")

    def _dim(self, node: ast.expr) -> Size:
        return size_of(node, self.text, self.scope.dims)

    def _require_dim(self, x: Expr, dim: Size, node: ast.expr, function: str) -> None:
        if x.type.is_literal or dim not in x.type.dims:
            dims = ", ".join(map(str, x.type.dims))
            message = f"{function}: expected a dim of the operand, [{dims}], got {dim}"
            help = did_you_mean(str(dim), map(str, x.type.dims)) if x.type.dims else "the operand is one number"
            raise self.text.refuse("SAGE108", message, node, help)

    def _dot(self, node: ast.Call) -> Expr:
        left, right, dim_node = self._arguments(node, "dot(x, w, DIM)")
        x, w, dim = self.expr(left), self.expr(right), self._dim(dim_node)
        for operand, place in ((x, left), (w, right)):
            self._require_dim(operand, dim, dim_node, "dot")
            if not self.scope.is_float(operand.type.element):
                message = f"dot: expected floats, got {operand.type.element}"
                raise self.text.refuse("SAGE107", message, place, "cast it: f32(...)")
        if x.type.element != w.type.element:
            message = f"dot: operands must have one element type, got {x.type.element} and {w.type.element}"
            raise self.text.refuse("SAGE107", message, node, self.types.cast_help(x, w))
        if LEADING in w.type.dims and LEADING not in x.type.dims:
            raise self.text.refuse("SAGE113", "dot: only the first operand may have `...`", right, "swap the operands")
        dims = (*x.type.dims, *(other for other in w.type.dims if other not in x.type.dims))
        # Every target accumulates in float32 at least, so the result has that type and a cast shows the rounding.
        element = "f64" if x.type.element == "f64" else "f32"
        return Dot(ValueType(element, _without(dims, dim)), x, w, dim)

    def _gather(self, node: ast.Call) -> Expr:
        left, dim_node, right = self._arguments(node, "gather(table, DIM, index)")
        table, dim, index = self.expr(left), self._dim(dim_node), self.expr(right)
        self._require_dim(table, dim, dim_node, "gather")
        if index.type.element not in ("i32", "i64"):
            message = f"gather: expected an i32 or i64 index, got {kind_words(index)}"
            raise self.text.refuse("SAGE107", message, right, 'declare the index as "i32[T]"')
        rest = _without(table.type.dims, dim)
        if set(rest) & set(index.type.dims) or LEADING in (*rest, *index.type.dims):
            message = "gather: table and index must not share dims or have `...`"
            raise self.text.refuse("SAGE113", message, node, "rename the shared dim, and name the dims of `...`")
        at = table.type.dims.index(dim)
        dims = (*table.type.dims[:at], *index.type.dims, *table.type.dims[at + 1 :])
        return Gather(ValueType(table.type.element, dims), table, dim, index)

    def _where(self, node: ast.Call) -> Expr:
        arguments = self._arguments(node, "where(condition, a, b)")
        condition, a, b = self._condition(arguments[0]), self.expr(arguments[1]), self.expr(arguments[2])
        joined = self.types.join(a, b, node, "and")
        if joined.is_literal and not condition.type.is_literal:
            message = "where: at least one value must be a tensor, because it determines the element type"
            raise self.text.refuse("SAGE107", message, node, FROM_CONDITION)
        return Select(
            ValueType(joined.element, self.types.dims(condition.type.dims, joined.dims, node)), condition, a, b
        )

    def _condition(self, node: ast.expr) -> Expr:
        value = self.expr(node)
        self.types.require_condition(value, node)
        return value

    def _extreme(self, node: ast.Call) -> Expr:
        op = cast(BinaryOp, cast(ast.Name, node.func).id)
        left, right = self._arguments(node, f"{op}(a, b)")
        a, b = self.expr(left), self.expr(right)
        self.types.require_number(a, left)
        self.types.require_number(b, right)
        if isinstance(b, DimRef) and b.size in a.type.dims:
            dim, shown = ast.unparse(right), ast.unparse(left)
            message = f"{op}(a, b) compares two values, and {dim} is the number of elements along a dim of `{shown}`"
            raise self.text.refuse("SAGE106", message, node, f"write a{op}({shown}, {dim}) to reduce the dim")
        return Binary(self.types.join(a, b, node, op), op, a, b)

    def _optional(self, node: ast.Call) -> Expr:
        name_node, with_node, without_node = self._arguments(node, "optional(name, with, without)")
        name = self._optional_name(name_node)
        a = self.expr_with(with_node, name)
        b = self.expr(without_node)
        element = self.types.element(a, b) or (
            "bool" if {a.type.element, b.type.element} == {"bool", "truth"} else None
        )
        both_literal = a.type.is_literal and b.type.is_literal
        if element is None or (a.type.dims != b.type.dims and not (both_literal or element == "bool")):
            message = f"optional: both values must have one type, got {a.type} with '{name}' and {b.type} without"
            raise self.text.refuse("SAGE107", message, node, "cast one of them, or expand it to the dims of the other")
        return IfPresent(ValueType(element, a.type.dims or b.type.dims), name, a, b)

    def _present(self, node: ast.Call) -> Expr:
        (argument,) = self._arguments(node, "present(name)")
        name = self._optional_name(argument)
        yes, no = (Number(ValueType("truth"), value) for value in (True, False))
        return IfPresent(ValueType("truth"), name, yes, no)

    def _optional_name(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name) or node.id not in self.scope.optional:
            help = (
                did_you_mean(getattr(node, "id", ""), self.scope.optional)
                or "declare an input or attr with `optional: true`"
            )
            raise self.text.refuse("SAGE131", "expected an optional input or attr", node, help)
        return node.id


def _without(dims: tuple[Size, ...], dim: Size) -> tuple[Size, ...]:
    return tuple(other for other in dims if other != dim)
