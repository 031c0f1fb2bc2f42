"""Evaluates the constant parts of expressions, to refuse `1.0 / 0.0` and `9 ** 9 ** 9` where they are written.

The evaluation is bounded: a power whose result does not fit is refused before it is computed.
"""

import ast
import math
import operator
from collections import defaultdict
from collections.abc import Callable

MAX_NUMBER = 2**53
"""The largest integer of an expression, beyond which float64 skips integers."""
_MAX_EXPONENT = 4096

Number = int | float


class OutOfRange(Exception):
    """A constant expression without a usable value; the message says why."""

    def __init__(self, message: str, node: ast.expr) -> None:
        super().__init__(message)
        self.node = node


def constant(node: ast.expr) -> Number | None:
    """The value of an expression without names, or None; raises OutOfRange if it has no usable value."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = constant(operand)
            return None if inner is None else -inner
        case ast.BinOp(left=left, op=operation, right=right):
            a, b = constant(left), constant(right)
            if a is None or b is None:
                return None
            compute = _power if isinstance(operation, ast.Pow) else _OPERATIONS[type(operation)]
            return _computed(node, lambda: compute(a, b))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            inner = constant(argument)
            return None if inner is None else _computed(node, lambda: _FUNCTIONS[name](inner))
    return None


def _computed(node: ast.expr, compute: Callable[[], Number]) -> Number:
    try:
        value = compute()
    except ZeroDivisionError:
        raise OutOfRange("division by zero", node) from None
    except OverflowError:
        raise OutOfRange("the value does not fit a 64-bit float", node) from None
    except ValueError as error:
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        raise OutOfRange(f"{name} is not defined for this number" if name else str(error), node) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise OutOfRange("the value does not fit a 64-bit float", node)
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise OutOfRange("an integer must be at most 2**53", node)
    return value


def _power(a: Number, b: Number) -> Number:
    """The power; ValueError if it is not real, or too large to be computed."""
    if a < 0 and b != int(b):
        raise ValueError("the power of a negative number is not real")
    if abs(b) > _MAX_EXPONENT and abs(a) not in (0, 1):
        raise ValueError(f"an exponent must be at most {_MAX_EXPONENT}")
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() * b > 256:
        raise ValueError("an integer must be at most 2**53")
    value = a**b
    assert isinstance(value, int | float), "a power of a negative number has a whole exponent"
    return value


_FUNCTIONS: dict[str, Callable[[Number], Number]] = {"exp": math.exp, "log": math.log, "sqrt": math.sqrt}


def _refused(a: Number, b: Number) -> Number:
    return 0  # the grammar has no such operator


_OPERATIONS: dict[type[ast.operator], Callable[[Number, Number], Number]] = defaultdict(
    lambda: _refused,
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
    },
)
