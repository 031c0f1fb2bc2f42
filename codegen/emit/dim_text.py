"""Writes the sizes of a kernel as lines of code: `T = x.shape[0]`, `I = gu.shape[-1] // 2`."""

import ast
import re
from collections.abc import Iterable

from sageLLM.codegen.expr.size import LEADING, Size, formula
from sageLLM.codegen.model.op import OpDef, Operand


def tidy(text: str) -> str:
    """The expression with the minimum of parentheses."""
    return ast.unparse(ast.parse(text, mode="eval"))


def dim_lines(op: OpDef, symbols: Iterable[str]) -> list[str]:
    """One line for each of the dims and for the dims that they depend on; dims that are attrs need no line."""
    attrs = {attr.name for attr in op.attrs if attr.type == "dim"}
    lines: dict[str, str] = {}
    left = [symbol for symbol in symbols if symbol not in attrs]
    while left:
        symbol = left.pop()
        found, needs = _dim(op, symbol)
        lines = {symbol: f"{symbol} = {found}", **lines}
        left += [name for name in needs if name not in attrs and name not in lines]
    return list(lines.values())


def _dim(op: OpDef, symbol: str) -> tuple[str, tuple[str, ...]]:
    """The text of a dim, and the other dims that it depends on."""
    compound = None
    for operand in op.inputs:
        for index, dim in enumerate(operand.type.dims):
            text = f"{operand.name}.shape[{_axis(operand, index)}]"
            if dim == Size.symbol(symbol) and dim != LEADING and not operand.optional:
                return text, ()
            solved = dim.solve(symbol, Size.symbol("WHOLE")) if symbol in dim.symbols and dim != LEADING else None
            if solved is not None and compound is None:
                others = tuple(name for name in solved.symbols if name != "WHOLE")
                compound = tidy(re.sub(r"\bWHOLE\b", text, formula(solved))), others
    assert compound is not None, f"{op.name}: the linker must ensure that an input determines {symbol}"
    return compound


def _axis(operand: Operand, index: int) -> int:
    """The index of an axis, counted from the end if the operand has leading dims."""
    return index - len(operand.type.dims) if LEADING in operand.type.dims else index
