"""Fits values to an op's operands: binds its dims and element types, and gives the types of its results."""

from dataclasses import dataclass, field

from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.types import DTYPES, ValueType
from sageLLM.codegen.model.op import OpDef, Operand


@dataclass(slots=True)
class Match:
    """The dims and element types of one op, bound operand by operand. The op's symbols are marked with a dot."""

    op: OpDef
    dims: dict[str, Size] = field(default_factory=dict)
    elements: dict[str, str] = field(default_factory=dict)
    leading: tuple[Size, ...] | None = None

    def why_not(self, operand: Operand, actual: ValueType) -> str | None:
        """Why a value does not fit an operand, or None after binding what it tells."""
        wanted = operand.type
        element = self._element(wanted.element, actual.element)
        if element is not None:
            return element
        dims, given = wanted.dims, actual.dims
        if dims[:1] == (LEADING,):
            cut = len(given) - len(dims) + 1
            if cut < 0 or (self.leading is not None and self.leading != given[:cut]):
                return f"want {wanted}"
            self.leading, dims, given = given[:cut], dims[1:], given[cut:]
        if len(dims) != len(given):
            return f"want {wanted}"
        for dim, size in zip(dims, given, strict=True):
            problem = self._dim(dim, size)
            if problem is not None:
                return f"want {operand.name} {wanted} with {problem}"
        return None

    def _element(self, wanted: str, actual: str) -> str | None:
        if wanted in DTYPES:
            return None if wanted == actual else f"want {wanted}"
        known = self.elements.setdefault(wanted, actual)
        if known != actual:
            return f"want {wanted} = {known}"
        allowed = self.op.elements.get(wanted, ())
        return f"want {' or '.join(allowed)}" if actual != "E" and actual not in allowed else None

    def _dim(self, wanted: Size, size: Size) -> str | None:
        name = wanted.name
        if name is not None and name not in self.dims:  # most dims are one letter that is met for the first time
            self.dims[name] = size
            return None
        marked = wanted.substitute({name: self.dims.get(name, Size.symbol(f".{name}")) for name in wanted.symbols})
        unknown = [symbol for symbol in marked.symbols if symbol.startswith(".")]
        if not unknown:
            return None if marked == size else f"{wanted} = {_shown(marked)}, got {_shown(size)}"
        solved = marked.solve(unknown[0], size) if len(unknown) == 1 else None
        if solved is None:
            return f"{wanted}, which {_shown(size)} does not determine"
        self.dims[unknown[0][1:]] = solved
        return None

    def result(self, type_: ValueType) -> ValueType:
        """The type of an output."""
        dims: list[Size] = []
        for dim in type_.dims:
            if dim == LEADING:
                dims += self.leading or ()
            else:
                dims.append(Size(dim.substitute(self.dims).terms))
        return ValueType(self.elements.get(type_.element, type_.element), tuple(dims))


def in_decode(type_: ValueType) -> ValueType:
    """In decode every sequence has one row: T is B."""
    return ValueType(type_.element, tuple(Size(dim.substitute({"T": Size.symbol("B")}).terms) for dim in type_.dims))


def from_decode(type_: ValueType) -> ValueType:
    return ValueType(type_.element, tuple(Size(dim.substitute({"B": Size.symbol("T")}).terms) for dim in type_.dims))


def _shown(size: Size) -> str:
    return str(Size(size.terms))
