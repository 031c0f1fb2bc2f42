"""Ops that move no data: each output is a part of an input's memory, described by an offset and strides."""

from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.kernel.rows import Affine, Load, Location, Nest, RowProgram, Store, Sweep

Strides = Mapping[str, tuple[Size, ...]]
"""The strides of each operand's declared dims, as sizes; the last is 1."""


@dataclass(frozen=True, slots=True)
class OutputPart:
    """An output as a part of `base`, in elements. The pairs of `where` must be equal; they belong to merged dims."""

    base: str
    offset: Size
    strides: tuple[Size, ...]
    where: tuple[tuple[Size, Size], ...]


def output_parts(program: RowProgram, strides: Strides) -> dict[str, OutputPart] | None:
    """The outputs as parts of inputs, or None for an op that computes, or that combines several parts."""
    found: dict[str, OutputPart] = {}
    for nest in program.nests:
        for store in _stores(nest):
            part = _part(store, strides) if store is not None else None
            if store is None or part is None or store.location.operand in found:
                return None
            found[store.location.operand] = part
    return found


def _stores(nest: Nest) -> list[Store | None]:
    """Stores of loaded elements, and None for any other step."""
    steps = [one for step in nest.steps for one in (step.steps if isinstance(step, Sweep) else (step,))]
    return [step if isinstance(step, Store) and isinstance(step.value, Load) else None for step in steps]


def _part(store: Store, strides: Strides) -> OutputPart | None:
    assert isinstance(store.value, Load), "the store must be of a loaded element"
    factors = _factors(store.value.location, strides)
    offset = factors.pop("", Size.of(0))
    own: list[Size] = []
    where: list[tuple[Size, Size]] = []
    for at in store.location.index:
        if at.offset != Size.of(0) or not at.terms:
            return None
        (inner, unit) = at.terms[-1]
        if unit != Size.of(1) or inner not in factors:
            return None
        own.append(factors.pop(inner))
        where += [(factors.pop(name), size * own[-1]) for name, size in at.terms[:-1] if name in factors]
    return OutputPart(store.value.location.operand, offset, tuple(own), tuple(where)) if not factors else None


def _factors(location: Location, strides: Strides) -> dict[str, Size]:
    """The number of elements by which a step of each variable moves the location; "" has the constant part."""
    found: dict[str, Size] = {}
    for at, stride in zip(location.index, strides[location.operand], strict=True):
        for name, size in _terms(at):
            moved = found.get(name, Size.of(0)) + size * stride
            found[name] = moved
    return {name: size for name, size in found.items() if name or size != Size.of(0)}


def _terms(at: Affine) -> list[tuple[str, Size]]:
    return [("", at.offset), *at.terms]
