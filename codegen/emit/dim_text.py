"""Writes the sizes of a kernel as lines of code: `T = x.shape[0]`, `I = gu.shape[-1] // 2`."""

import ast
import re
from collections.abc import Iterable

from sageLLM.codegen.expr.size import LEADING, Size, formula
from sageLLM.codegen.model.dim_sources import WHOLE, DimSource, dim_sources
from sageLLM.codegen.model.op import OpDef


def tidy(text: str) -> str:
    """The expression with the minimum of parentheses."""
    return ast.unparse(ast.parse(text, mode="eval"))


def dim_lines(op: OpDef, symbols: Iterable[str]) -> list[str]:
    """One line for each of the dims and for the dims that they depend on; dims that are attrs need no line."""
    attrs = {attr.name for attr in op.attrs if attr.type == "dim"}
    sources = dim_sources(op.inputs, attrs)
    used: set[str] = set()
    left = [symbol for symbol in symbols if symbol not in attrs]
    order: list[str] = []
    while left:
        symbol = left.pop()
        order = [symbol, *order]
        used.add(symbol)
        left += [name for name in sources[symbol].needs if name not in attrs and name not in used]
    ranks = {symbol: rank for rank, symbol in enumerate(sources)}
    compound = sorted((s for s in order if sources[s].needs), key=ranks.__getitem__)
    plain = [s for s in dict.fromkeys(order) if not sources[s].needs]
    return [f"{symbol} = {_text(sources[symbol])}" for symbol in (*plain, *compound)]


def _text(source: DimSource) -> str:
    operand, index = source.operand, source.index
    # Counted from the end if the operand has leading dims.
    axis = index - len(operand.type.dims) if LEADING in operand.type.dims else index
    text = re.sub(rf"\b{WHOLE}\b", f"{operand.name}.shape[{axis}]", formula(source.formula))
    return tidy(text if source.divisor == Size.of(1) else f"({text}) // ({formula(source.divisor)})")


def leading_text(op: OpDef) -> str:
    """`x.shape[:-1]`, the leading dims `...` of the first required input that has them; "" without one."""
    operand = next((o for o in op.inputs if LEADING in o.type.dims and not o.optional), None)
    return leading_of(operand.name, len(operand.type.dims) - 1) if operand else ""


def leading_of(name: str, num_trailing: int) -> str:
    return f"{name}.shape[:-{num_trailing}]" if num_trailing else f"{name}.shape"
