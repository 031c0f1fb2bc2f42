"""Evaluates the constant parts of expressions, to refuse `1.0 / 0.0` and `9 ** 9 ** 9` where they are written.

The evaluation is bounded: a power whose result does not fit is refused before it is computed.
"""

import ast
import math

MAX_NUMBER = 2**53
"""The largest integer of an expression, beyond which float64 skips integers."""
_MAX_EXPONENT = 4096

Number = int | float


class OutOfRange(Exception):
    """A constant expression without a usable value; the message says why."""


def constant(node: ast.expr) -> Number | None:
    """The value of an expression without names, or None; raises OutOfRange if it has no usable value."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = constant(operand)
            return None if inner is None else -inner
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = constant(left), constant(right)
            return None if a is None or b is None else _checked(_binary(operator, a, b))
    return None


def _binary(operator: ast.operator, a: Number, b: Number) -> Number:
    try:
        match operator:
            case ast.Add():
                return a + b
            case ast.Sub():
                return a - b
            case ast.Mult():
                return a * b
            case ast.Div():
                return a / b
            case ast.FloorDiv():
                return a // b
            case ast.Mod():
                return a % b
            case ast.Pow():
                return _power(a, b)
    except ZeroDivisionError:
        raise OutOfRange("division by zero") from None
    except OverflowError:
        raise OutOfRange("the value does not fit a 64-bit float") from None
    return 0  # operators that the grammar refuses


def _power(a: Number, b: Number) -> Number:
    if a < 0 and b != int(b):
        raise OutOfRange("the power of a negative number is not real")
    if abs(b) > _MAX_EXPONENT and abs(a) not in (0, 1):
        raise OutOfRange(f"an exponent must be at most {_MAX_EXPONENT}")
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() * b > 256:
        raise OutOfRange("an integer must be at most 2**53")
    value = a**b
    assert isinstance(value, int | float), "a power of a negative number has a whole exponent"
    return value


def _checked(value: Number) -> Number:
    if isinstance(value, float) and not math.isfinite(value):
        raise OutOfRange("the value does not fit a 64-bit float")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise OutOfRange("an integer must be at most 2**53")
    return value
