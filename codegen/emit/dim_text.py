"""Writes where a kernel gets its sizes from: `T = x.shape[0]`, `I = gu.shape[-1] // 2`."""

import ast
import re
from collections.abc import Iterable

from sageLLM.codegen.expr.size import LEADING, Size, formula
from sageLLM.codegen.model.op import OpDef, Operand


def tidy(text: str) -> str:
    """The expression with as few parentheses as Python needs."""
    return ast.unparse(ast.parse(text, mode="eval"))


def dim_lines(op: OpDef, wanted: Iterable[str]) -> list[str]:
    """One line for each of the dims and for those that it follows from; dims that are attrs need none."""
    given = {attr.name for attr in op.attrs if attr.type == "dim"}
    lines: dict[str, str] = {}
    left = [symbol for symbol in wanted if symbol not in given]
    while left:
        symbol = left.pop()
        found, needs = _dim(op, symbol)
        lines = {symbol: f"{symbol} = {found}", **lines}
        left += [name for name in needs if name not in given and name not in lines]
    return list(lines.values())


def _dim(op: OpDef, symbol: str) -> tuple[str, tuple[str, ...]]:
    """The text of a dim, and the other dims that it needs."""
    compound = None
    for operand in op.inputs:
        for index, dim in enumerate(operand.type.dims):
            text = f"{operand.name}.shape[{_place(operand, index)}]"
            if dim == Size.symbol(symbol) and dim != LEADING and not operand.optional:
                return text, ()
            solved = dim.solve(symbol, Size.symbol("WHOLE")) if symbol in dim.symbols and dim != LEADING else None
            if solved is not None and compound is None:
                others = tuple(name for name in solved.symbols if name != "WHOLE")
                compound = tidy(re.sub(r"\bWHOLE\b", text, formula(solved))), others
    assert compound is not None, f"{op.name}: the linker let through {symbol}, which no input tells"
    return compound


def _place(operand: Operand, index: int) -> int:
    return index - len(operand.type.dims) if LEADING in operand.type.dims else index
