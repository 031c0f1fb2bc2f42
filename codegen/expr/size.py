"""Symbolic sizes: polynomials over named dims in a normal form, so that `2*I - I` and `I` are equal.

Two sizes must compare equal exactly if they are equal for all dims; a normal form makes this a comparison of terms. It
exists because division is exact (`D/2` states that D is even), so coefficients are rational and no floor is needed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, reduce
from math import gcd, lcm

Monomial = tuple[str, ...]  # symbols in order, repeated for powers; () is the constant
Coefficient = int | Fraction  # an int if it is whole: nearly all are, and fractions compute ten times slower


@dataclass(frozen=True, slots=True)
class Size:
    """A sum of monomials with rational coefficients, sorted and without zeros. `text` is the spec's text, if any."""

    terms: tuple[tuple[Monomial, Coefficient], ...]
    text: str | None = field(default=None, compare=False)

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(value: int) -> "Size":
        return _size({(): value})

    @staticmethod
    @lru_cache(maxsize=1024)
    def symbol(name: str) -> "Size":
        return Size((((name,), 1),))

    def __add__(self, other: "Size") -> "Size":
        total = dict(self.terms)
        for monomial, factor in other.terms:
            total[monomial] = total.get(monomial, 0) + factor
        return _size(total)

    def __neg__(self) -> "Size":
        return _size({monomial: -factor for monomial, factor in self.terms})

    def __sub__(self, other: "Size") -> "Size":
        return self + -other

    def __mul__(self, other: "Size") -> "Size":
        total: dict[Monomial, Coefficient] = {}
        for left, a in self.terms:
            for right, b in other.terms:
                monomial = tuple(sorted(left + right))
                total[monomial] = total.get(monomial, 0) + a * b
        return _size(total)

    def divided_by(self, divisor: int) -> "Size":
        return _size({monomial: Fraction(factor, divisor) for monomial, factor in self.terms})

    def quotient(self, divisor: "Size") -> "Size | None":
        """The exact quotient by a number or a product of dims, or None: G*M / G is M."""
        if len(divisor.terms) != 1:
            return None
        (symbols, number) = divisor.terms[0]
        found: dict[Monomial, Coefficient] = {}
        for monomial, factor in self.terms:
            rest = list(monomial)
            for symbol in symbols:
                if symbol not in rest:
                    return None
                rest.remove(symbol)
            found[tuple(rest)] = Fraction(factor) / number
        return _size(found)

    def less_multiple(self, other: "Size") -> "Size":
        """self - c * other, with c so that the first term that is negative in both vanishes: 2*D - 2*Dr by D - Dr."""
        own = dict(self.terms)
        for monomial, factor in other.terms:
            if factor < 0 and own.get(monomial, 0) < 0:
                multiple = Fraction(own[monomial]) / factor
                return self + _size({name: -multiple * number for name, number in other.terms})
        return self - other

    @property
    def constant_term(self) -> int:
        """The number without a dim: 1 of `Dr + 1`; 0 if it is not whole."""
        value = next((factor for monomial, factor in self.terms if not monomial), 0)
        return int(value) if value.denominator == 1 else 0

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(sorted({symbol for monomial, _ in self.terms for symbol in monomial}))

    @property
    def constant(self) -> int | None:
        """The value of a size without symbols, or None."""
        if self.symbols:
            return None
        value = self.terms[0][1] if self.terms else 0
        return int(value) if value.denominator == 1 else None

    @property
    def name(self) -> str | None:
        """The dim, if the size is a single dim; else None."""
        if len(self.terms) != 1:
            return None
        monomial, factor = self.terms[0]
        return monomial[0] if len(monomial) == 1 and factor == 1 else None

    @property
    def degree(self) -> int:
        return max((len(monomial) for monomial, _ in self.terms), default=0)

    @property
    def is_never_negative(self) -> bool:
        """Whether all coefficients are positive, which suffices because dims are positive."""
        return all(factor > 0 for _, factor in self.terms)

    def substitute(self, env: Mapping[str, "Size"]) -> "Size":
        """The size with the symbols of `env` replaced; other symbols are kept."""
        # Fast paths for the two common cases: nothing to replace, and a single symbol.
        if all(symbol not in env for monomial, _ in self.terms for symbol in monomial):
            return Size(self.terms)
        if len(self.terms) == 1 and len(self.terms[0][0]) == 1 and self.terms[0][1] == 1:
            return Size(env[self.terms[0][0][0]].terms)
        total = Size(())
        for monomial, factor in self.terms:
            product = _size({(): factor})
            for symbol in monomial:
                product = product * env.get(symbol, Size.symbol(symbol))
            total = total + product
        return total

    def solve(self, symbol: str, value: "Size") -> "Size | None":
        """The size of `symbol` for which self == value, if its only term is linear; else None."""
        own = [(monomial, factor) for monomial, factor in self.terms if symbol in monomial]
        if len(own) != 1 or own[0][0] != (symbol,):
            return None
        rest = value - (self - _size(dict(own)))
        return _size({monomial: Fraction(factor) / own[0][1] for monomial, factor in rest.terms})

    def evaluate(self, env: Mapping[str, int]) -> Fraction:
        total = Fraction(0)
        for monomial, factor in self.terms:
            total += factor * reduce(lambda product, symbol: product * env[symbol], monomial, 1)
        return total

    def __str__(self) -> str:
        return self.text if self.text is not None else formula(self)


def _size(terms: Mapping[Monomial, Coefficient]) -> Size:
    """The normal form: without zeros, sorted by falling degree, so that equal polynomials have equal terms."""
    kept = {monomial: _normal(factor) for monomial, factor in terms.items() if factor}
    return Size(tuple(sorted(kept.items(), key=lambda item: (-len(item[0]), item[0]))))


def _normal(factor: Coefficient) -> Coefficient:
    return factor.numerator if factor.denominator == 1 else factor


def is_never_negative(size: Size, known: Iterable[Size] = ()) -> bool:
    """Whether the size, or the size less a multiple of one of the `known` non-negative ones, has no negative term."""
    return size.is_never_negative or any(size.less_multiple(other).is_never_negative for other in known)


LEADING = Size(Size.symbol("R").terms, text="...")
"""The leading dims written `...`; in formulas R is their product."""


def volume(dims: Iterable[Size]) -> Size:
    """The number of elements."""
    return reduce(lambda product, dim: product * dim, dims, Size.of(1))


def formula(size: Size) -> str:
    """The size as Python text, with common factors in front and the denominator at the end."""
    if not size.terms:
        return "0"
    denominator = lcm(*(factor.denominator for _, factor in size.terms))
    whole = [(monomial, int(factor * denominator)) for monomial, factor in size.terms]
    common, inner = _factored(whole)
    factors = ([str(common[1])] if common[1] != 1 else []) + list(common[0])
    text = " * ".join([*factors, f"({_sum(inner)})"]) if len(inner) > 1 and factors else _sum(whole)
    if denominator == 1:
        return text
    return f"({text}) // {denominator}" if len(whole) > 1 or " * " in text else f"{text} // {denominator}"


Terms = list[tuple[Monomial, int]]


def _factored(terms: Terms) -> tuple[tuple[Monomial, int], Terms]:
    shared = list(terms[0][0])
    for monomial, _ in terms[1:]:
        rest = list(monomial)
        for symbol in list(shared):
            if symbol in rest:
                rest.remove(symbol)
            else:
                shared.remove(symbol)
    number = gcd(*(factor for _, factor in terms))
    return (tuple(shared), number), [(_without(monomial, shared), factor // number) for monomial, factor in terms]


def _without(monomial: Monomial, shared: list[str]) -> Monomial:
    rest = list(monomial)
    for symbol in shared:
        rest.remove(symbol)
    return tuple(rest)


def _sum(terms: Terms) -> str:
    text = ""
    for monomial, factor in terms:
        sign = "-" if factor < 0 else "+"
        product = " * ".join(([str(abs(factor))] if abs(factor) != 1 or not monomial else []) + list(monomial))
        text += f" {sign} {product}" if text else ("-" if factor < 0 else "") + product
    return text
