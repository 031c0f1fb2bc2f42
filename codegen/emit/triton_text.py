"""Writes typed expressions as Triton, over values that a kernel holds in registers.

All floating-point arithmetic is in float32. A value of a narrower type is held as a float32 that this type can hold. So
an operation on narrow values, and a cast to a narrow type, is written `device.rounded(..., E)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sageLLM.codegen.emit.cpp_text import ROOTS
from sageLLM.codegen.expr.size import formula
from sageLLM.codegen.expr.tree import (
    AttrRef,
    Binary,
    Cast,
    DimRef,
    Expr,
    IfPresent,
    Number,
    Ref,
    Select,
    Unary,
    walk,
)
from sageLLM.codegen.expr.types import DTYPES, LITERALS
from sageLLM.codegen.kernel.rows import Load

TRITON_DTYPES = {"bool": "tl.int1", "i8": "tl.int8", "i32": "tl.int32", "i64": "tl.int64", "f16": "tl.float16",
                 "bf16": "tl.bfloat16", "f32": "tl.float32", "f64": "tl.float64"}  # fmt: skip
_INTEGERS = ("bool", "i8", "i32", "i64")
_EXACT = {"neg", "not", "abs", "relu", "floor", "round"}
_FUNCTIONS = {"exp": "tl.exp({})", "log": "tl.log({})", "sqrt": "tl.sqrt({})", "rsqrt": "tl.rsqrt({})",
              "sigmoid": "tl.sigmoid({})", "tanh": "device.tanh({})", "erf": "tl.erf({})", "abs": "tl.abs({})",
              "floor": "tl.floor({})", "round": "device.rint({})", "neg": "(-{})", "not": "(not {})"}  # fmt: skip
_CALLS = {"//": "device.floor_divide", "%": "device.floor_remainder"}
_AT_RUN_TIME = (AttrRef, Ref, Load)
"""Leaves that are values on the device; Python computes with the others."""


def is_narrow(element: str) -> bool:
    """Whether values of the type are rounded: element variables, which may be float32 as well, and the half types."""
    return element in ("f16", "bf16") or element not in (*DTYPES, *LITERALS)


@dataclass(frozen=True, slots=True)
class TritonText:
    """Writes the expressions of one kernel; `leaf` writes what is not arithmetic, such as names and loads."""

    leaf: Callable[[Expr], str]
    is_index: bool = False  # integers are positions, which are not negative

    def __call__(self, expr: Expr) -> str:
        match expr:
            case Number(value=bool() | int() | str() as value):
                return repr(value)
            case Number(value=float() as value):
                return repr(value) if abs(value) < float("inf") else f'float("{value}")'
            case AttrRef(name=name):
                return name
            case DimRef(size=size):
                return f"({formula(size)})"
            case Unary():
                return self._unary(expr)
            case Binary():
                return self._binary(expr)
            case Select(condition=condition, a=a, b=b):
                return self._select(condition, a, b)
            case Cast():
                return self._cast(expr)
            case IfPresent(name=name, a=a, b=b):
                return self._if_present(name, a, b)
        return self.leaf(expr)

    def _unary(self, expr: Unary) -> str:
        x = self(expr.x)
        if expr.op == "relu":
            return self._wrapped(f"tl.where({x} < 0, 0, {x})", expr.type.element)  # keeps NaN, unlike tl.maximum
        if expr.op == "not" and expr.type.element != "truth":
            return f"(~{x})"
        text = _FUNCTIONS[expr.op].format(x)
        return text if expr.op in _EXACT else self.rounded(text, expr.type.element)

    def _binary(self, expr: Binary) -> str:
        a, b = self(expr.a), self(expr.b)
        if expr.op in ("min", "max"):
            is_integer = expr.type.element in _INTEGERS or expr.type.element == "int"
            nan = "" if is_integer else ", propagate_nan=tl.PropagateNan.ALL"
            return self._wrapped(f"tl.{expr.op}imum({a}, {b}{nan})", expr.type.element)
        if expr.op == "**":
            return self.rounded(_power(expr, a, b), expr.type.element)
        if expr.op in ("//", "%") and not self.is_index and any(isinstance(one, _AT_RUN_TIME) for one in walk(expr)):
            return self.rounded(f"{_CALLS[expr.op]}({a}, {b})", expr.type.element)
        op = {"and": "&", "or": "|"}.get(expr.op, expr.op)
        if expr.type.element == "truth":
            op = expr.op
        text = f"({a} {op} {b})"
        return self.rounded(text, expr.type.element) if op in ("+", "-", "*", "/", "//", "%") else text

    def _select(self, condition: Expr, a: Expr, b: Expr) -> str:
        if condition.type.is_literal:
            return f"({self(a)} if {self(condition)} else {self(b)})"
        text = f"tl.where({self(condition)}, {self(a)}, {self(b)})"
        return self._wrapped(text, "i8" if "i8" in (a.type.element, b.type.element) else "")

    def _cast(self, expr: Cast) -> str:
        x, source, target = self(expr.x), expr.x.type.element, expr.type.element
        if target in _INTEGERS:
            return x if source in (target, "int", "truth") else f"({x}).to({TRITON_DTYPES[target]})"
        wide = f"({x}).to(tl.float32)" if source in _INTEGERS else x
        return wide if source == target else self.rounded(wide, target)

    def _if_present(self, name: str, a: Expr, b: Expr) -> str:
        if isinstance(a, Number) and isinstance(b, Number) and (a.value, b.value) == (True, False):
            return f"({name} is not None)"
        return f"({self(a)} if {name} is not None else {self(b)})"

    def rounded(self, text: str, element: str) -> str:
        if is_narrow(element):
            return f"device.rounded({text}, {TRITON_DTYPES.get(element, element)})"
        return self._wrapped(text, element)

    def _wrapped(self, text: str, element: str) -> str:
        """i8 is the only integer type that Triton widens: next to a number of the row."""
        return f"({text}).to(tl.int8)" if element == "i8" else text


def _power(expr: Binary, a: str, b: str) -> str:
    """A product for a small whole exponent, which is exact for integers."""
    exponent = expr.b.value if isinstance(expr.b, Number) else None
    if exponent in (0.5, -0.5):
        return f"tl.{ROOTS[exponent]}({a})"
    if isinstance(exponent, int | float) and exponent == int(exponent) and 0 < exponent <= 8:
        return f"device.integer_power({a}, {int(exponent)})"
    if expr.type.element in _INTEGERS and isinstance(exponent, int):
        return f"device.integer_power({a}, {exponent})"
    return f"device.power({a}, {b})"
