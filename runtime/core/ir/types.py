"""Tensor types, the type patterns that ops declare for their operands, and the matching of types against patterns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, TypeAlias

from sageLLM.runtime.core.errors import IRError, TypeMismatch
from sageLLM.runtime.core.ir.dims import Dim, Expr, Quotient, Sym, evaluate, free_symbols, split_linear

DTYPES: Mapping[str, int] = {"bool": 1, "i8": 1, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
"""Element types and the bytes per element."""

Binding: TypeAlias = "Dim | str | tuple[Dim, ...]"
"""The value of a name in a pattern: a size, an element type, or (for `...`) the leading sizes."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """An element type and a shape, e.g. f32[T, 128]."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class TypePattern:
    """A declared type: an element type or element variable, and dims that may contain symbols; `...` comes first."""

    element: str
    dims: tuple[Dim | EllipsisType, ...]

    def __post_init__(self) -> None:
        if ... in self.dims[1:]:
            raise IRError(f"{self}: '...' must come first: it matches the leading dims")

    def __str__(self) -> str:
        return f"{self.element}[{', '.join('...' if d is ... else str(d) for d in self.dims)}]"

    @property
    def has_leading(self) -> bool:
        return self.dims[:1] == (...,)

    @property
    def trailing(self) -> tuple[Dim, ...]:
        """The dims without the `...`."""
        return tuple(d for d in self.dims if not isinstance(d, EllipsisType))

    @property
    def is_variable(self) -> bool:
        return self.element not in DTYPES


@dataclass(frozen=True, slots=True)
class ElementType:
    """Notation for patterns by subscript: `E[..., H]`, `f32[P, D // 2]`. A name that is not a dtype is a variable."""

    name: str

    def __getitem__(self, dims: Dim | EllipsisType | tuple[Dim | EllipsisType, ...]) -> TypePattern:
        return TypePattern(self.name, dims if isinstance(dims, tuple) else (dims,))


E = ElementType("E")
bool_, i8, i32, i64 = ElementType("bool"), ElementType("i8"), ElementType("i32"), ElementType("i64")
f16, bf16, f32, f64 = ElementType("f16"), ElementType("bf16"), ElementType("f32"), ElementType("f64")


def bind(
    patterns: Mapping[str, TypePattern], types: Mapping[str, TensorType], env: dict[str, Any], *, op: str = "op"
) -> None:
    """Matches operand types against an op's patterns and adds the bindings of their names to env (values: `Binding`).

    The first occurrence of a symbol binds it, and later ones must agree. A compound dim is compared once its symbols
    are bound; with one unknown, linear symbol (`2*I`, `D//2`) it is solved exactly. Operands that `types` lacks are
    skipped. Raises TypeMismatch naming op, operand, both types and the operand that bound the conflicting size.
    """
    matcher = _Matcher(op, env)
    for operand, actual in types.items():
        if operand not in patterns:
            raise TypeMismatch(f"{op}: unknown operand {operand!r}, expected {', '.join(patterns)}")
        matcher.match(operand, patterns[operand], actual)
    matcher.solve_compounds()


def instantiate(pattern: TypePattern, env: Mapping[str, Any]) -> TensorType:
    """The type of a pattern under the bindings of env; TypeMismatch if a name of the pattern is unbound."""
    unbound = {s for d in pattern.trailing for s in free_symbols(d) if s not in env}
    if pattern.is_variable and pattern.element not in env:
        unbound.add(pattern.element)
    if pattern.has_leading and "..." not in env:
        unbound.add("...")
    if unbound:
        raise TypeMismatch(f"{pattern} requires {', '.join(sorted(unbound))}, which no operand or attribute binds")
    leading = env["..."] if pattern.has_leading else ()
    element = env[pattern.element] if pattern.is_variable else pattern.element
    return TensorType(element, (*leading, *(evaluate(d, env) for d in pattern.trailing)))


class _Compound:
    """A dim such as `2*I` that is matched after the plain symbols are bound."""

    __slots__ = ("actual", "dim", "operand", "pattern", "size")

    def __init__(self, operand: str, pattern: TypePattern, actual: TensorType, dim: Dim, size: Dim) -> None:
        self.operand, self.pattern, self.actual, self.dim, self.size = operand, pattern, actual, dim, size


@dataclass(slots=True)
class _Matcher:
    op: str
    env: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)  # name in a pattern -> the operand that bound it
    compounds: list[_Compound] = field(default_factory=list)

    def match(self, operand: str, pattern: TypePattern, actual: TensorType) -> None:
        conflicts = self._match_element(operand, pattern, actual)
        leading = len(actual.shape) - len(pattern.trailing)
        if leading < 0 or (leading > 0 and not pattern.has_leading):
            at_least = "at least " if pattern.has_leading else ""
            raise self._mismatch(operand, pattern, actual, f" of {at_least}{len(pattern.trailing)} dims")
        if pattern.has_leading:
            conflicts += self._bind("...", actual.shape[:leading], operand)
        for dim, size in zip(pattern.trailing, actual.shape[leading:], strict=True):
            if isinstance(dim, Sym):
                conflicts += self._bind(dim.name, size, operand)
            elif isinstance(dim, Expr):
                self.compounds.append(_Compound(operand, pattern, actual, dim, size))
            elif dim != size:
                raise self._mismatch(operand, pattern, actual, "")
        if conflicts:
            raise self._mismatch(operand, pattern, actual, f" with {', '.join(conflicts)}")

    def solve_compounds(self) -> None:
        """Settles the compound dims; each solved symbol may make another one solvable, so it iterates to a fixpoint."""
        waiting = self.compounds
        while waiting:
            stuck = [compound for compound in waiting if not self._settle(compound)]
            if len(stuck) == len(waiting):
                unknown = sorted(free_symbols(stuck[0].dim) - self.env.keys())
                raise self._compound_mismatch(stuck[0], f"; {stuck[0].dim} does not determine {' and '.join(unknown)}")
            waiting = stuck

    def _match_element(self, operand: str, pattern: TypePattern, actual: TensorType) -> list[str]:
        if pattern.is_variable:
            return self._bind(pattern.element, actual.dtype, operand)
        if pattern.element != actual.dtype:
            raise self._mismatch(operand, pattern, actual, "")
        return []

    def _bind(self, name: str, value: Binding, operand: str) -> list[str]:
        """Binds the name or compares its value; returns a conflict as text."""
        if name not in self.env:
            self.env[name] = value
            self.sources[name] = operand
            return []
        return [] if self.env[name] == value else [self._known(name)]

    def _settle(self, compound: _Compound) -> bool:
        """Compares the dim, or solves it for its only unknown; False if several are unknown."""
        unknown = sorted(free_symbols(compound.dim) - self.env.keys())
        if len(unknown) > 1:
            return False
        if unknown:
            value = _solve(compound.dim, unknown[0], self.env, compound.size)
            if value is None:
                raise self._compound_mismatch(compound, f"; no {unknown[0]} satisfies {compound.dim} = {compound.size}")
            self._bind(unknown[0], value, compound.operand)
            return True
        expected = evaluate(compound.dim, self.env)
        if expected != compound.size:
            known = ", ".join(self._known(name) for name in sorted(free_symbols(compound.dim)))
            raise self._compound_mismatch(compound, f" with {compound.dim} = {expected}, as {known}")
        return True

    def _known(self, name: str) -> str:
        value = self.env[name]
        shown = f"({', '.join(map(str, value))})" if isinstance(value, tuple) else str(value)
        return f"{name} = {shown} (from {self.sources.get(name, 'an attribute')})"

    def _compound_mismatch(self, compound: _Compound, why: str) -> TypeMismatch:
        return self._mismatch(compound.operand, compound.pattern, compound.actual, why)

    def _mismatch(self, operand: str, pattern: TypePattern, actual: TensorType, why: str) -> TypeMismatch:
        return TypeMismatch(f"{self.op}: operand {operand!r}: expected {pattern}, got {actual}{why}")


class _Unknown(Sym):
    """A symbol with a name that formulas cannot contain, so that solving never captures a symbol of the graph."""

    __slots__ = ()

    def __init__(self) -> None:
        object.__setattr__(self, "_text", "?")


def _solve(dim: Dim, symbol: str, env: Mapping[str, Any], size: Dim) -> Dim | None:
    """The value of the symbol for which dim equals size, exactly; None without a solution or for a non-linear dim."""
    unknown = _Unknown()
    substituted = evaluate(dim, {**env, symbol: unknown})
    value = _solve_for(substituted, unknown, size)
    # Floor division may lose a remainder on the way, so the solution must reproduce the size.
    if value is None or evaluate(substituted, {"?": value}) != size:
        return None
    return value


def _solve_for(dim: Dim, unknown: Sym, size: Dim) -> Dim | None:
    parts = split_linear(dim, unknown)
    if parts is None:
        return None
    holder, coefficient, rest = parts
    if "?" in free_symbols(coefficient) or "?" in free_symbols(rest) or coefficient == 0:
        return None
    value = (size - rest) // coefficient
    if value * coefficient != size - rest:
        return None
    if holder == unknown:
        return value
    if isinstance(holder, Quotient) and "?" not in free_symbols(holder.den):
        return _solve_for(holder.num, unknown, value * holder.den)
    return None
