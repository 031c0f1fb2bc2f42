"""Searches values for which a condition holds, to report conditions that never do.

The values of a name are drawn from its type and from the constants of the condition, so that `H == 5120` and
`T % 128 == 37` are satisfied. All combinations are tried. A condition with too many of them, or with a form that the
search does not know, is assumed to hold for some values, unless one part of its `and` never does.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from sageLLM.codegen.expr.constants import constant

Kind = Literal["size", "int", "float", "bool", "text", "index", "any"]
Kinds = Callable[[str], "Kind | Optional | Sequence[object]"]
"""The kind of a leaf by its text (`H`, `bytes(x)`, `window`), or all of its values."""

MAX_TRIALS = 20000
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64, 128, 4096)
_OPERATIONS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: math.pow,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min, "max": max, "abs": abs, "sqrt": math.sqrt, "log": math.log, "exp": math.exp,
    "floor": math.floor, "ceil": math.ceil, "round": round,
}  # fmt: skip
_CONSTANTS: Mapping[str, object] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class Optional:
    """A kind of values, or null."""

    kind: Kind


class _Unknown(Exception):
    """A form that the search does not know."""


def may_hold(node: ast.expr, kinds: Kinds) -> bool:
    """Whether values were found for which the condition holds. Comparisons with null hold, as in `checks`."""
    parts = node.values if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And) else ()
    if not all(may_hold(part, kinds) for part in parts):
        return False
    try:
        found = list(_leaves(node))
        texts = {id(leaf): ast.unparse(leaf) for leaf in found}  # once, since every trial looks leaves up
        names = list(dict.fromkeys(texts.values()))
        values = [_candidates(kinds(name), node) for name in names]
    except _Unknown:
        return True
    if math.prod(map(len, values)) > MAX_TRIALS:
        return True
    for chosen in product(*values):
        by_name = dict(zip(names, chosen, strict=True))
        if _holds(node, {leaf: by_name[text] for leaf, text in texts.items()}):
            return True
    return False


def _holds(node: ast.expr, env: Mapping[int, object]) -> bool:
    try:
        return bool(_value(node, env))
    except (ArithmeticError, ValueError):
        return False
    except (TypeError, _Unknown):
        return True  # null in arithmetic, or an unknown form


def _leaves(node: ast.expr) -> Iterable[ast.expr]:
    """The parts with free values: names, items of lists, functions of values, and membership in a list by name."""
    match node:
        case ast.Name(id=name):
            yield from () if name in _CONSTANTS else (node,)
        case ast.Constant():
            return
        case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
            for arg in args:
                yield from _leaves(arg)
        case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[ast.Name()]) | ast.Call() | ast.Subscript():
            yield node
        case ast.BoolOp() | ast.BinOp() | ast.UnaryOp() | ast.Compare() | ast.IfExp() | ast.List():
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    yield from _leaves(child)
        case _:
            raise _Unknown


def _value(node: ast.expr, env: Mapping[int, object]) -> Any:
    if id(node) in env:
        return env[id(node)]
    match node:
        case ast.Name(id=name):
            return _CONSTANTS[name]
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items):
            return [_value(item, env) for item in items]
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](*(_value(arg, env) for arg in args))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, env)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, env)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, env) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_value(part, env) for part in parts)
        case ast.BinOp(left=left, op=operation, right=right):
            return _OPERATIONS[type(operation)](_value(left, env), _value(right, env))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, env) else orelse, env)
        case ast.Compare(left=left, ops=operations, comparators=others):
            sides = [_value(side, env) for side in (left, *others)]
            pairs = zip(operations, sides, sides[1:], strict=False)
            return all(_OPERATIONS[type(operation)](a, b) for operation, a, b in pairs)
    raise _Unknown


def _candidates(kind: Kind | Optional | Sequence[object], node: ast.expr) -> Sequence[object]:
    if isinstance(kind, Optional):
        return (*_candidates(kind.kind, node), None)
    if not isinstance(kind, str):
        return kind
    texts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    numbers = [value for one in ast.walk(node) if isinstance(one, ast.expr) if (value := constant(one)) is not None]
    whole = {int(value) for value in numbers}
    near = {value + step for value in whole for step in (-1, 0, 1)}
    near |= {a + b for a in whole for b in whole} | {a * b for a in whole for b in whole}
    near |= {a // b for a in whole for b in (2, 3, 4, *whole) if b}
    near |= {(a // b + 1) * b + c for a in whole for b in whole if b for c in whole}  # a remainder above a bound
    match kind:
        case "bool":
            return (False, True)
        case "text":
            return (*dict.fromkeys(texts), "another text")
        case "size":
            return sorted({*_SIZES, *(value for value in near if value >= 1)})
        case "index":
            return sorted({*range(9), *(value for value in near if 0 <= value < 2**16)})
        case "int":
            return sorted({-1, 0, *_SIZES, *near, *(-value for value in near)})
        case "float":
            floats = {float(value) for value in numbers}
            steps = {value + step for value in floats for step in (-1.0, -1e-6, 0.0, 1e-6, 1.0)}
            return sorted({0.0, 0.5, 1.0, -1.0, 2.0, 1e-6, 1e6, *steps, *(-value for value in floats)})
    raise _Unknown
