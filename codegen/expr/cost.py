"""Derives an op's work from its body: floating-point operations and bytes moved, as formulas of its dims.

An element of a variable type E has `E_size` bytes; `has_NAME` is 1 if an optional input is there, else 0.
"""

from collections.abc import Iterable, Mapping
from functools import reduce

from sageLLM.codegen.expr.size import Size, volume
from sageLLM.codegen.expr.tree import (
    Binary,
    Dot,
    Expr,
    Gather,
    IfPresent,
    Program,
    Reduce,
    Ref,
    Select,
    Unary,
    children,
    walk,
)
from sageLLM.codegen.expr.types import DTYPES, ValueType

ELEMENT_BYTES = dict(zip(DTYPES, (1, 1, 4, 8, 2, 2, 4, 8), strict=True))
ZERO = Size.of(0)


def element_bytes(element: str) -> Size:
    """The bytes of one element; for a variable E the symbol `E_size`."""
    return Size.of(ELEMENT_BYTES[element]) if element in ELEMENT_BYTES else Size.symbol(f"{element}_size")


def tensor_bytes(type_: ValueType) -> Size:
    return volume(type_.dims) * element_bytes(type_.element)


def program_flops(program: Program) -> Size:
    """One for each arithmetic operation on an element, two for each multiply-add of a `dot`."""
    return _sum(_flops(statement.value) for statement in program.statements)


def _flops(expr: Expr) -> Size:
    if isinstance(expr, IfPresent):
        present, absent = _flops(expr.a), _flops(expr.b)
        return absent + Size.symbol(f"has_{expr.name}") * (present - absent)
    return _own_flops(expr) + _sum(_flops(child) for child in children(expr))


def _own_flops(expr: Expr) -> Size:
    if isinstance(expr, Dot):
        dims = (*expr.x.type.dims, *(dim for dim in expr.w.type.dims if dim not in expr.x.type.dims))
        return Size.of(2) * volume(dims)
    if isinstance(expr, Reduce):
        return volume(expr.x.type.dims)
    if isinstance(expr, Unary | Binary | Select) and not expr.type.is_literal:
        return volume(expr.type.dims)
    return ZERO


def program_bytes(
    program: Program, inputs: Mapping[str, ValueType], outputs: Mapping[str, ValueType], optional: frozenset[str]
) -> Size:
    """What is read and written once: a gathered table counts what is taken of it, an output that is a view nothing."""
    views = {view.name: view for view in program.views}
    aliases = {
        statement.target
        for statement in program.statements
        if isinstance(statement.value, Ref) and statement.value.name in views
    }
    computing = [statement.value for statement in program.statements if statement.target not in aliases]
    nodes = [node for value in computing for node in walk(value)]
    gathered = {
        node.table.name: tensor_bytes(node.type)
        for node in nodes
        if isinstance(node, Gather) and isinstance(node.table, Ref)
    }
    read = {views[node.name].base if node.name in views else node.name for node in nodes if isinstance(node, Ref)}
    total = ZERO
    for name in (name for name in inputs if name in read):
        size = gathered.get(name, tensor_bytes(inputs[name]))
        total += size * Size.symbol(f"has_{name}") if name in optional else size
    return total + _sum(tensor_bytes(type_) for name, type_ in outputs.items() if name not in aliases)


def _sum(sizes: Iterable[Size]) -> Size:
    return reduce(lambda total, size: total + size, sizes, ZERO)
