"""Finds the common type of two operands: one element type, and dims matched by name."""

import ast
from dataclasses import dataclass

from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.syntax import Text
from sageLLM.codegen.expr.tree import Binary, Expr, Number, Ref, Unary
from sageLLM.codegen.expr.types import LARGEST, ValueType

_LITERAL_RANK = {"int": 0, "float": 1}
_INTEGER_BITS = {"i8": 8, "i32": 32, "i64": 64}

FROM_CONDITION = "write where(condition, x, 0), with a tensor x, which determines the element type"


@dataclass(frozen=True, slots=True)
class OperandTypes:
    """Checks the types of operands of one text; every method raises Refused after a finding."""

    text: Text
    scope: Scope

    def join(self, a: Expr, b: Expr, node: ast.expr, op: str) -> ValueType:
        """The type of a binary operation; raises Refused if the operands have no common type."""
        element = self.element(a, b)
        if element is None:
            message = f"`{op}`: operands must have one element type, got {a.type.element} and {b.type.element}"
            raise self.text.refuse("SAGE107", message, node, self.cast_help(a, b))
        for x in (a, b):
            self._require_fits(x, element, node)
        return ValueType(element, self.dims(a.type.dims, b.type.dims, node))

    def _require_fits(self, x: Expr, element: str, node: ast.expr) -> None:
        """Refuses a constant that the type of the other operand cannot represent."""
        if self.scope.is_float(element):
            self._require_finite(x, element, node)
        bits = _INTEGER_BITS.get(element)
        value = _integer(x)
        if bits is None or value is None:
            return
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if not low <= value <= high:
            message = f"{value} does not fit {element}, which has {low} to {high}"
            wider = "cast the other operand: i64(...)" if element != "i64" else "use a smaller constant"
            raise self.text.refuse("SAGE103", message, node, wider)

    def _require_finite(self, x: Expr, element: str, node: ast.expr) -> None:
        value, largest = _number(x), LARGEST.get(element, LARGEST["f32"])
        if value is not None and abs(value) > largest:
            message = f"{value:g} does not fit {element}, which has at most {largest:g}"
            raise self.text.refuse("SAGE103", message, node, "use a smaller constant")

    def element(self, a: Expr, b: Expr) -> str | None:
        """The common element type, or None; a literal adopts the type of the other operand."""
        x, y = a.type.element, b.type.element
        if x == y:
            return x
        if a.type.is_literal and b.type.is_literal:
            return max(x, y, key=_LITERAL_RANK.__getitem__) if {x, y} <= set(_LITERAL_RANK) else None
        if a.type.is_literal or b.type.is_literal:
            literal, strong = (x, y) if a.type.is_literal else (y, x)
            return strong if self._adapts(literal, strong) else None
        return None

    def _adapts(self, literal: str, strong: str) -> bool:
        if literal == "truth":
            return strong == "bool"
        return self.scope.is_float(strong) or (literal == "int" and strong != "bool" and self.scope.is_integer(strong))

    def cast_help(self, a: Expr, b: Expr) -> str:
        """The remedy for operands of different element types."""
        names = [expr.name for expr in (b, a) if isinstance(expr, Ref) and expr.type.element != "f32"]
        return f"cast one operand: f32({names[0]})" if names else "cast one operand: f32(...)"

    def dims(self, a: tuple[Size, ...], b: tuple[Size, ...], node: ast.expr) -> tuple[Size, ...]:
        """The union of the dims, matched by name, in the order of the operand with all dims, else left dims first."""
        if set(b) <= set(a):
            return a
        if set(a) <= set(b):
            return b
        joined = (*a, *(dim for dim in b if dim not in a))
        if LEADING in joined[1:]:
            joined = (LEADING, *(dim for dim in joined if dim != LEADING))
        if {LEADING} < set(joined) and not (LEADING in a and LEADING in b):
            shown = " with ".join(f"[{', '.join(map(str, dims))}]" for dims in (a, b))
            help = "one operand must have all dims of the other one; name the dims of `...` one by one"
            raise self.text.refuse("SAGE113", f"cannot broadcast {shown} by name", node, help)
        return joined

    def require_number(self, x: Expr, node: ast.expr) -> None:
        if x.type.element in ("bool", "truth", "str"):
            help = FROM_CONDITION if x.type.element != "str" else "compare it: where(name == 'text', a, b)"
            raise self.text.refuse("SAGE107", f"expected a number, got {kind_words(x)}", node, help)

    def require_condition(self, x: Expr, node: ast.expr) -> None:
        if x.type.element not in ("bool", "truth"):
            message = f"expected a condition, got {kind_words(x)}"
            raise self.text.refuse("SAGE107", message, node, "write a comparison: ... > 0")


def _number(x: Expr) -> float | None:
    """The value of a number or its negation, or None."""
    match x:
        case Number(value=int() | float() as value) if not isinstance(value, bool):
            return float(value)
        case Unary(op="neg", x=Number(value=int() | float() as value)) if not isinstance(value, bool):
            return -float(value)
    return None


def _integer(x: Expr) -> int | None:
    """The value of an integer constant, or None; other operators than these are rare, and not checked."""
    match x:
        case Number(value=int() as value) if not isinstance(value, bool):
            return value
        case Binary(op="+" | "-" | "*" | "**" as op, a=a, b=b):
            left, right = _integer(a), _integer(b)
            if left is None or right is None or (op == "**" and not 0 <= right <= 64):
                return None
            return int(left**right) if op == "**" else {"+": left + right, "-": left - right, "*": left * right}[op]
    return None


def kind_words(x: Expr) -> str:
    """The type of a value in words, for messages."""
    words = {"truth": "a condition", "bool": "a condition", "int": "an integer", "float": "a number", "str": "text"}
    return words.get(x.type.element, str(x.type))
