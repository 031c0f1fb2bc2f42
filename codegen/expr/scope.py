"""The names that an expression may use."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.types import FLOATS, INTEGERS, ValueType


@dataclass(slots=True)
class Scope:
    """The names that an expression may use."""

    values: dict[str, ValueType] = field(default_factory=dict)
    attrs: dict[str, ValueType] = field(default_factory=dict)
    dims: Mapping[str, object] = field(default_factory=dict)
    elements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    known: tuple[Size, ...] = ()  # sizes that the op's conditions guarantee to be non-negative
    unbound: frozenset[str] = frozenset()  # element variables that no required input has

    @property
    def names(self) -> list[str]:
        return [*self.values, *self.attrs, *(dim for dim in self.dims if dim != "R")]

    def is_float(self, element: str) -> bool:
        return all(dtype in FLOATS for dtype in self.elements.get(element, (element,))) or element == "float"

    def is_integer(self, element: str) -> bool:
        return all(dtype in INTEGERS for dtype in self.elements.get(element, (element,))) or element == "int"
