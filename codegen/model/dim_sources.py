"""Operand dims that determine the sizes of an op, in an order in which each depends on earlier ones only."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sageLLM.codegen.expr.size import LEADING, Size, volume
from sageLLM.codegen.model.op import Operand

WHOLE = "WHOLE"
"""The symbol of the operand's size in a formula."""


@dataclass(frozen=True, slots=True)
class DimSource:
    """A dim as `formula / divisor`, of the size of one operand dim (the symbol WHOLE) and of dims known before it."""

    operand: Operand
    index: int
    formula: Size
    divisor: Size = field(default_factory=lambda: Size.of(1))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for name in (*self.formula.symbols, *self.divisor.symbols) if name != WHOLE)


def dim_sources(inputs: Sequence[Operand], known: Collection[str]) -> dict[str, DimSource]:
    """The source of each dim that the required inputs determine; `known` are the dims that are attrs.

    A dim that is an operand's size needs nothing else. `2*I` or `N + D` is solved for its only unknown dim, repeatedly.
    """
    sizes = [(o, i, dim) for o in inputs if not o.optional for i, dim in enumerate(o.type.dims) if dim != LEADING]
    found: dict[str, DimSource] = {}
    for operand, index, dim in sizes:
        if dim.name is not None and dim.name not in known:
            found.setdefault(dim.name, DimSource(operand, index, Size.symbol(WHOLE)))
    count = -1
    while count != len(found):
        count = len(found)
        for operand, index, dim in sizes:
            unknown = [symbol for symbol in dim.symbols if symbol not in found and symbol not in known]
            source = _solved(operand, index, dim, unknown[0]) if len(unknown) == 1 else None
            if source is not None:
                found[unknown[0]] = source
    return found


def _solved(operand: Operand, index: int, dim: Size, symbol: str) -> DimSource | None:
    """The source of a symbol that one term of the dim has: (x - rest) / factor; None for N*N or N*D + N."""
    own = [(monomial, factor) for monomial, factor in dim.terms if symbol in monomial]
    if len(own) != 1 or own[0][0].count(symbol) != 1:
        return None
    whole, (monomial, factor) = Size.symbol(WHOLE), own[0]
    if len(monomial) == 1:
        formula = dim.solve(symbol, whole)
        return DimSource(operand, index, formula) if formula is not None else None
    others = volume(Size.symbol(name) for name in monomial if name != symbol)
    if factor != int(factor):
        return None
    rest = dim - others * Size.of(int(factor)) * Size.symbol(symbol)
    return DimSource(operand, index, whole - rest, others * Size.of(int(factor)))
