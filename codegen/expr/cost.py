"""Derives an op's work from its body: floating-point operations and bytes moved, as formulas of its dims.

An element of a variable type E has `E_size` bytes; `has_NAME` is 1 if an optional input is present, else 0.
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
    Scan,
    Select,
    TopK,
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
    if isinstance(expr, Reduce | Scan | TopK):
        return volume(expr.x.type.dims)
    if isinstance(expr, Unary | Binary | Select) and not expr.type.is_literal:
        return volume(expr.type.dims)
    return ZERO


def program_reads(program: Program, inputs: Mapping[str, ValueType], optional: frozenset[str]) -> dict[str, Size]:
    """Bytes read of each input; 0 for an input that no arithmetic reads."""
    views = {view.name: program.root(view.name) for view in program.views}
    aliases = _aliases(program)
    nodes = [node for s in program.statements if s.target not in aliases for node in walk(s.value)]
    tables = [node for node in nodes if isinstance(node, Gather) and isinstance(node.table, Ref)]
    gathered = {node.table.name: tensor_bytes(node.type) for node in tables if isinstance(node.table, Ref)}
    read = {views.get(node.name, node.name) for node in nodes if isinstance(node, Ref)}
    found: dict[str, Size] = {}
    for name, type_ in inputs.items():
        size = gathered.get(name, tensor_bytes(type_)) if name in read else ZERO
        found[name] = size * Size.symbol(f"has_{name}") if name in optional else size
    return found


def program_writes(program: Program, outputs: Mapping[str, ValueType]) -> dict[str, Size]:
    """Bytes written of each output; 0 for an output that is a view of an input."""
    aliases = _aliases(program)
    return {name: ZERO if name in aliases else tensor_bytes(type_) for name, type_ in outputs.items()}


def _aliases(program: Program) -> set[str]:
    """Outputs that are a view of an input and share its memory. Assigning to a view of an output is a copy."""
    views = {view.name for view in program.views}
    return {s.target for s in program.statements
            if isinstance(s.value, Ref) and s.value.name in views and s.target not in views}  # fmt: skip


def _sum(sizes: Iterable[Size]) -> Size:
    return reduce(lambda total, size: total + size, sizes, ZERO)
