"""Value types, an element type and named dims, with their text forms `E[T, 2*I]` and `2*I`."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.syntax import Text, parse_expression

FLOATS = ("f16", "bf16", "f32", "f64")
INTEGERS = ("i8", "i32", "i64")
LARGEST = {"f16": 65504.0, "bf16": 3.3895313892515355e38, "f32": 3.4028234663852886e38, "f64": 1.7976931348623157e308}
"""The largest finite values."""
DTYPES = ("bool", *INTEGERS, *FLOATS)

MAX_RANK = 6
MAX_DEGREE = 6
DIM_NAME = re.compile(r"[A-Z][A-Za-z0-9]{0,15}\Z")


@dataclass(frozen=True, slots=True)
class ValueType:
    """An element type and dims. Literals and attrs have the types `LITERALS`, which adapt to the other operand."""

    element: str
    dims: tuple[Size, ...] = ()

    @property
    def is_literal(self) -> bool:
        return self.element in LITERALS

    def __str__(self) -> str:
        return self.element if self.is_literal else f"{self.element}[{', '.join(map(str, self.dims))}]"


LITERALS = ("truth", "int", "float", "str")
"""Element types of values that are known when a kernel is called: Python's bool, int and float."""


def parse_type(text: Text, elements: Mapping[str, object], dims: Mapping[str, object]) -> ValueType:
    """`E[..., H]` with known elements and dims; raises Refused otherwise."""
    found = re.fullmatch(r"\s*(\w+)\s*\[([^\[\]]*)\]\s*", text.value)
    if not found:
        help = 'write an element type and dims, e.g. "E[T, H]"'
        raise text.refuse("SAGE114", f"expected a type, got '{text.value}'", None, help)
    element = found[1]
    if element not in DTYPES and element not in elements:
        at = text.part(found.start(1), found.end(1))
        raise at.refuse(
            "SAGE114", f"unknown element type '{element}'", None, did_you_mean(element, [*DTYPES, *elements])
        )
    sizes = tuple(parse_dim(part, dims) for part in split_dims(text.part(found.start(2), found.end(2))))
    return _checked(text, ValueType(element, sizes))


def _checked(text: Text, type_: ValueType) -> ValueType:
    if LEADING in type_.dims[1:]:
        raise text.refuse("SAGE114", "`...` must be the first dim", None, "write E[..., H]")
    if len(type_.dims) > MAX_RANK:
        message = f"a tensor must have at most {MAX_RANK} dims, got {len(type_.dims)}"
        raise text.refuse("SAGE114", message, None, "merge dims, or write `...` for the leading ones")
    if len(set(type_.dims)) < len(type_.dims):
        twice = next(dim for i, dim in enumerate(type_.dims) if dim in type_.dims[:i])
        message = f"dims are matched by name, so {twice} must appear only once in a type"
        raise text.refuse("SAGE113", message, None, "use two names")
    return type_


def split_dims(text: Text) -> list[Text]:
    """The parts between commas that are outside parentheses."""
    if not text.value.strip():
        return []
    cuts, depth = [-1], 0
    for offset, character in enumerate(text.value):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            cuts.append(offset)
    return [text.trimmed_part(a + 1, b) for a, b in zip(cuts, [*cuts[1:], len(text.value)], strict=True)]


def parse_dim(text: Text, dims: Mapping[str, object]) -> Size:
    """A dim such as `H`, `2*I`, `D/2`, `B + 1` or `...`; raises Refused otherwise."""
    if text.value == "...":
        return LEADING
    node = parse_expression(text)
    size = size_of(node, text, dims)
    return Size(size.terms, text=dim_text(node))


def dim_text(node: ast.expr) -> str:
    """The dim as Python text, with exact division written `//`."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Div):
            inner.op = ast.FloorDiv()
    return ast.unparse(node)


def size_of(node: ast.expr, text: Text, dims: Mapping[str, object], *, leading: bool = False) -> Size:
    """The size of an expression of dims; raises Refused for unknown names and unsupported operators.

    `leading` allows R, the product of the dims of `...`.
    """
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return Size.of(value)
        case ast.Name(id=name):
            return Size.symbol(name) if leading and name == "R" else _symbol(name, node, text, dims)
        case ast.BinOp(left=left, op=ast.Div() | ast.FloorDiv(), right=ast.Constant(value=int() as divisor)) if (
            divisor > 0
        ):
            return size_of(left, text, dims, leading=leading).divided_by(divisor)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() as operator, right=right):
            a, b = size_of(left, text, dims, leading=leading), size_of(right, text, dims, leading=leading)
            if isinstance(operator, ast.Mult) and a.degree + b.degree > MAX_DEGREE:
                message = f"a size must multiply at most {MAX_DEGREE} dims"
                raise text.refuse("SAGE114", message, node, "declare one dim for a part of the product")
            return a + b if isinstance(operator, ast.Add) else a - b if isinstance(operator, ast.Sub) else a * b
    help = "use dims, whole numbers, + - * and / by a number"
    raise text.refuse("SAGE114", f"expected a size, got '{ast.unparse(node)}'", node, help)


def _symbol(name: str, node: ast.AST, text: Text, dims: Mapping[str, object]) -> Size:
    if name == "R":
        message = "R is reserved for the product of the dims of `...`"
        raise text.refuse("SAGE115", message, node, "write `...` as the first dim")
    if name not in dims:
        near = did_you_mean(name, [dim for dim in dims if dim != "R"])
        help = near if near and near.startswith("did") else "declare it in specs/dims.yaml, or under the op's `dims`"
        raise text.refuse("SAGE115", f"undefined dim '{name}'", node, help)
    return Size.symbol(name)
