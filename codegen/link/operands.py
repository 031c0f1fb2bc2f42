"""Matches values to an op's operands: binds its dims and element types, and infers the types of its results."""

from dataclasses import dataclass, field

from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.types import DTYPES, ValueType
from sageLLM.codegen.model.op import OpDef, Operand


@dataclass(slots=True)
class Match:
    """Dims and element types of one op, bound operand by operand.

    Dims of the op that are not bound yet are written `.H`, so that they differ from the caller's dims of that name.
    """

    op: OpDef
    dims: dict[str, Size] = field(default_factory=dict)
    elements: dict[str, str] = field(default_factory=dict)
    leading: tuple[Size, ...] | None = None

    def bind(self, operand: Operand, actual: ValueType) -> str | None:
        """Binds the operand's dims to a value's sizes; returns the expected type in words if the value does not fit."""
        declared = operand.type
        element = self._element(declared.element, actual.element)
        if element is not None:
            return element
        dims, sizes = declared.dims, actual.dims
        if dims[:1] == (LEADING,):
            cut = len(sizes) - len(dims) + 1
            if cut < 0 or (self.leading is not None and self.leading != sizes[:cut]):
                return str(declared)
            self.leading, dims, sizes = sizes[:cut], dims[1:], sizes[cut:]
        if len(dims) != len(sizes):
            return str(declared)
        for dim, size in zip(dims, sizes, strict=True):
            problem = self._dim(dim, size)
            if problem is not None:
                return f"{declared} with {problem}" if problem else str(declared)
        return None

    def _element(self, declared: str, actual: str) -> str | None:
        if declared in DTYPES:
            return None if declared == actual else declared
        known = self.elements.setdefault(declared, actual)
        if known != actual:
            return f"{declared} = {known}"
        allowed = self.op.elements.get(declared, ())
        return " or ".join(allowed) if actual != "E" and actual not in allowed else None

    def _dim(self, declared: Size, size: Size) -> str | None:
        name = declared.name
        if name is not None and name not in self.dims:  # fast path: most dims are one symbol, seen for the first time
            self.dims[name] = size
            return None
        marked = declared.substitute({name: self.dims.get(name, Size.symbol(f".{name}")) for name in declared.symbols})
        unknown = [symbol for symbol in marked.symbols if symbol.startswith(".")]
        if not unknown:
            if marked == size:
                return None
            return f"{declared} = {_shown(marked)}" if str(declared) != _shown(marked) else ""
        solved = marked.solve(unknown[0], size) if len(unknown) == 1 else None
        if solved is None:
            return f"a size {declared}"
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
    """The type in a decode step, where every sequence has one row: T becomes B."""
    return ValueType(type_.element, tuple(Size(dim.substitute({"T": Size.symbol("B")}).terms) for dim in type_.dims))


def from_decode(type_: ValueType) -> ValueType:
    """The type of a decode step's value as the layout writes it: B becomes T."""
    return ValueType(type_.element, tuple(Size(dim.substitute({"B": Size.symbol("T")}).terms) for dim in type_.dims))


def _shown(size: Size) -> str:
    return str(Size(size.terms))
