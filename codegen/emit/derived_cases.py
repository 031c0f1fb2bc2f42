"""Sizes to test an op with, derived from its operands: ones, odd sizes, sizes above a block, and even ones."""

import operator
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.tree import AttrRef, Binary, DimRef, Expr, Gather, Number, Ref, Unary, walk
from sageLLM.codegen.expr.types import INTEGERS
from sageLLM.codegen.model.op import OpDef

Case = dict[str, int | list[int]]
NUM_CASES = 4
LONGEST = 4096
"""Elements of an operand at most, because Triton's interpreter is slow."""
_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "and": lambda a, b: a and b, "or": lambda a, b: a or b, "min": min, "max": max,
}  # fmt: skip
_SIZES = ([1] * 8, [3, 5, 7, 9, 11, 13, 15, 17], [7, 33, 65, 3, 5, 9, 1, 1], [2, 4, 6, 8, 10, 12, 2, 2],
          [4, 2, 8, 2, 4, 2, 4, 2], [6, 3, 12, 4, 2, 2, 1, 1], [5, 8, 3, 16, 7, 4, 9, 2],
          [3, 20, 5, 6, 7, 12, 9, 2], [2] * 8)  # fmt: skip


def derived_cases(op: OpDef, ops: Mapping[str, OpDef], attrs: Mapping[str, Any]) -> list[Case]:
    """Up to NUM_CASES sizes that the op accepts with these attrs; none where random integers might be invalid."""
    if not _takes_random_operands(op, ops):
        return []
    names = list(dict.fromkeys([*(s for o in op.inputs for d in o.type.dims for s in _symbols(d)), *_dim_attrs(op)]))
    found: list[Case] = []
    for sizes in _SIZES:
        for shift in range(max(1, len(names))):
            rotated = [*sizes[shift:], *sizes[:shift]]
            case = dict(zip(names, rotated, strict=False))
            if len(case) == len(names) and _is_accepted(op, case, attrs):
                found.append({name: [2, size] if name == "R" and size > 1 else size for name, size in case.items()})
                break
    unique = {repr(case): case for case in found}
    return list(unique.values())[:NUM_CASES]


def _symbols(dim: Size) -> list[str]:
    return list(dim.symbols)  # R for `...`


def _dim_attrs(op: OpDef) -> list[str]:
    return [attr.name for attr in op.attrs if attr.type == "dim"]


def _takes_random_operands(op: OpDef, ops: Mapping[str, OpDef]) -> bool:
    """Whether the only integers are rows of tables, for which the tests know the number of rows."""
    integers = {o.name for o in op.inputs if o.type.element in INTEGERS}
    if op.reference is not None:
        return not integers
    if op.program is not None:
        indices = [node.index for s in op.program.statements for node in walk(s.value) if isinstance(node, Gather)]
        return all(isinstance(index, Ref) for index in indices)
    return all(_takes_random_operands(ops[call.op], ops) for call in op.fuses)


def _is_accepted(op: OpDef, case: Mapping[str, int], attrs: Mapping[str, Any]) -> bool:
    """Whether all sizes are whole and positive, and the op's conditions hold."""
    for operand in (*op.inputs, *op.outputs):
        sizes = list(_values(operand.type.dims, case))
        count = Fraction(1)
        for size in sizes:
            count *= size
        if not all(size.denominator == 1 and size >= 1 for size in sizes) or count > LONGEST:
            return False
    views = op.program.views if op.program is not None else ()
    if not all(size.denominator == 1 and size >= 0 for view in views for size in _values(view.type.dims, case)):
        return False
    known = {**{attr.name: attr.default for attr in op.attrs if attr.default is not None}, **attrs, **case}
    return all(_value(one.value, known) is True for one in op.where)


def _values(dims: tuple[Size, ...], case: Mapping[str, int]) -> Iterator[Fraction]:
    return (dim.evaluate(case) for dim in dims)


def _value(expr: Expr, known: Mapping[str, Any]) -> Any:
    """The value of a condition; None if it depends on an attr without a default, or is of another form."""
    match expr:
        case Number(value=value):
            return value
        case AttrRef(name=name):
            return known.get(name)
        case DimRef(size=size):
            return size.evaluate(known) if all(name in known for name in size.symbols) else None
        case Unary(op="not", x=x):
            value = _value(x, known)
            return None if value is None else not value
        case Binary(op=op, a=a, b=b) if op in _OPERATORS:
            left, right = _value(a, known), _value(b, known)
            try:
                return None if left is None or right is None else _OPERATORS[op](left, right)
            except ZeroDivisionError:
                return None
    return None
