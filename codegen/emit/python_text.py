"""Writes expressions that are known when a graph is built, such as conditions and defaults, as Python."""

import ast
from collections.abc import Callable

from sageLLM.codegen.expr.size import formula
from sageLLM.codegen.expr.tree import AttrRef, Binary, DimRef, Expr, IfPresent, Number, Unary

_FUNCTIONS = {"exp": "math.exp", "log": "math.log", "sqrt": "math.sqrt", "floor": "math.floor"}


def python_text(expr: Expr, name: Callable[[str], str]) -> str:
    """The value of an expression of dims, attrs and literals; `name` writes a dim or attr."""
    match expr:
        case Number(value=value):
            return repr(value)
        case AttrRef(name=attr):
            return name(attr)
        case DimRef(size=size):
            return name(formula(size))
        case Unary(op="neg", x=x):
            return f"(-{python_text(x, name)})"
        case Unary(op="not", x=x):
            return f"(not {python_text(x, name)})"
        case Unary(op=op, x=x):
            return f"{_FUNCTIONS.get(op, op)}({python_text(x, name)})"
        case Binary(op="min" | "max" as op, a=a, b=b):
            return f"{op}({python_text(a, name)}, {python_text(b, name)})"
        case Binary(op=op, a=a, b=b):
            return f"({python_text(a, name)} {op} {python_text(b, name)})"
        case IfPresent(name=optional, a=a, b=b):
            return f"({python_text(a, name)} if {name(optional)} is not None else {python_text(b, name)})"
    raise AssertionError(f"{type(expr).__name__} is not known when a graph is built")


def renamed(text: str, old: str, new: str) -> str:
    """Python text with one name replaced."""
    tree = ast.parse(text, mode="eval").body
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == old:
            node.id = new
    return ast.unparse(tree)


def mentions(text: str, name: str) -> bool:
    """Whether Python text reads a name."""
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(ast.parse(text, mode="eval")))
