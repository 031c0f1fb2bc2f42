"""Symbolic sizes: integer formulas over named dims, in one canonical form so that equal sizes compare equal.

A `Dim` is an int or an `Expr`. An Expr is a symbol, a floor quotient, a remainder, or a polynomial over these; the
operators fold to an int as soon as no symbol is left. Symbols are sizes: a division assumes a divisor other than zero.

The canonical form makes comparison a string comparison: shapes are compared, hashed and memoized far more often than
they are built, and shape inference needs `2*I == I + I` without a solver. Polynomials are multiplied out, their terms
sorted, and a quotient or remainder keeps only what does not divide exactly. Equality is sound but not complete:
`a // b * b` and `a - a % b` are the same number and compare unequal.
"""

from __future__ import annotations

import ast
import keyword
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

from sageLLM.runtime.core.errors import IRError, ParseError

MAX_TERMS = 4096  # a formula that multiplies out to more is a mistake, not a size
MAX_TEXT = 2000  # of a formula in a graph file, which is untrusted input
MAX_DEPTH = 64

_Atoms: TypeAlias = "tuple[Expr, ...]"  # a product of symbols, quotients and remainders, sorted by text


class Expr:
    """An immutable integer formula. Build it with `Sym` and the operators + - * // %."""

    __slots__ = ("_text",)
    _text: str

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Expr) and self._text == other._text)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"dim formulas are immutable (setting {name!r} of {self})")

    def __add__(self, other: Dim) -> Dim:
        return _add(self, other) if isinstance(other, (int, Expr)) else NotImplemented

    def __radd__(self, other: Dim) -> Dim:
        return _add(other, self) if isinstance(other, (int, Expr)) else NotImplemented

    def __neg__(self) -> Dim:
        return _mul(-1, self)

    def __sub__(self, other: Dim) -> Dim:
        return _add(self, -other) if isinstance(other, (int, Expr)) else NotImplemented

    def __rsub__(self, other: Dim) -> Dim:
        return _add(other, -self) if isinstance(other, (int, Expr)) else NotImplemented

    def __mul__(self, other: Dim) -> Dim:
        return _mul(self, other) if isinstance(other, (int, Expr)) else NotImplemented

    def __rmul__(self, other: Dim) -> Dim:
        return _mul(other, self) if isinstance(other, (int, Expr)) else NotImplemented

    def __floordiv__(self, other: Dim) -> Dim:
        return _floordiv(self, other) if isinstance(other, (int, Expr)) else NotImplemented

    def __rfloordiv__(self, other: Dim) -> Dim:
        return _floordiv(other, self) if isinstance(other, (int, Expr)) else NotImplemented

    def __mod__(self, other: Dim) -> Dim:
        return _mod(self, other) if isinstance(other, (int, Expr)) else NotImplemented

    def __rmod__(self, other: Dim) -> Dim:
        return _mod(other, self) if isinstance(other, (int, Expr)) else NotImplemented

    def __reduce__(self) -> tuple[object, ...]:
        return parse_dim, (self._text,)  # immutable slots cannot be restored attribute by attribute


Dim: TypeAlias = int | Expr


class Sym(Expr):
    """A named size, such as `T`, the tokens in a step."""

    __slots__ = ()

    def __init__(self, name: str) -> None:
        if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
            raise IRError(f"{name!r} cannot name a dim: expected an ASCII identifier")
        object.__setattr__(self, "_text", name)

    @property
    def name(self) -> str:
        return self._text


class Quotient(Expr):
    """num // den, rounded down, in a form that does not simplify."""

    __slots__ = ("den", "num")
    num: Dim
    den: Dim

    def __init__(self, num: Dim, den: Dim) -> None:
        _init_pair(self, num, den, "//")


class Remainder(Expr):
    """num % den, with the sign of den, in a form that does not simplify."""

    __slots__ = ("den", "num")
    num: Dim
    den: Dim

    def __init__(self, num: Dim, den: Dim) -> None:
        _init_pair(self, num, den, "%")


class Poly(Expr):
    """A sum of integer multiples of products; `terms` is sorted by falling degree, then by text."""

    __slots__ = ("terms",)
    terms: tuple[tuple[_Atoms, int], ...]

    def __init__(self, terms: Mapping[_Atoms, int]) -> None:
        ordered = tuple(sorted(terms.items(), key=lambda t: (-len(t[0]), [str(atom) for atom in t[0]])))
        object.__setattr__(self, "terms", ordered)
        object.__setattr__(self, "_text", _sum_text(ordered))


def dims(names: str) -> tuple[Sym, ...]:
    """Symbols from their names: `T, H = dims("T H")`."""
    return tuple(Sym(name) for name in names.split())


def free_symbols(dim: Dim) -> frozenset[str]:
    """The names of the symbols in a formula; empty for an int."""
    if isinstance(dim, int):
        return frozenset()
    if isinstance(dim, Sym):
        return frozenset((dim.name,))
    if isinstance(dim, (Quotient, Remainder)):
        return free_symbols(dim.num) | free_symbols(dim.den)
    return frozenset().union(*(free_symbols(atom) for atoms, _ in _terms(dim).items() for atom in atoms))


def evaluate(dim: Dim, env: Mapping[str, object]) -> Dim:
    """Replaces symbols by their values in env, all at once: an int if every symbol has an int, else a formula.

    Symbols that env lacks stay. A value that is not a Dim raises TypeError; a zero divisor raises ZeroDivisionError.
    """
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Sym):
        return _lookup(dim, env)
    if isinstance(dim, Quotient):
        return evaluate(dim.num, env) // evaluate(dim.den, env)
    if isinstance(dim, Remainder):
        return evaluate(dim.num, env) % evaluate(dim.den, env)
    total: Dim = 0
    for atoms, coefficient in _terms(dim).items():
        product: Dim = coefficient
        for atom in atoms:
            product = product * evaluate(atom, env)
        total = total + product
    return total


def product(sizes: tuple[Dim, ...]) -> Dim:
    """The number of elements of a shape; 1 for no dims."""
    result: Dim = 1
    for size in sizes:
        result = result * size
    return result


@lru_cache(maxsize=4096)
def parse_dim(text: str) -> Dim:
    """The inverse of `str`: names, decimal ints, + - * // % and parentheses; anything else is a ParseError."""
    if len(text) > MAX_TEXT:
        raise ParseError(f"a dim formula of {len(text)} characters is too long (at most {MAX_TEXT})")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ParseError(f"{text!r} is not a dim formula") from None
    try:
        return _from_ast(tree.body, text, MAX_DEPTH)
    except ZeroDivisionError:
        raise ParseError(f"{text!r} divides by zero") from None


def split_linear(dim: Dim, symbol: Expr) -> tuple[Expr, Dim, Dim] | None:
    """(a, c, rest) with dim == c * a + rest, where only the atom `a` contains the symbol; None if not of that form."""
    name = str(symbol)
    holders = {atom for atoms, _ in _terms(dim).items() for atom in atoms if name in free_symbols(atom)}
    if len(holders) != 1:
        return None
    (holder,) = holders
    coefficient: dict[_Atoms, int] = {}
    rest: dict[_Atoms, int] = {}
    for atoms, factor in _terms(dim).items():
        others = tuple(atom for atom in atoms if atom != holder)
        if len(atoms) - len(others) > 1:
            return None
        (rest if len(atoms) == len(others) else coefficient)[others] = factor
    return holder, _build(coefficient), _build(rest)


def _init_pair(expr: Expr, num: Dim, den: Dim, sign: str) -> None:
    object.__setattr__(expr, "num", num)
    object.__setattr__(expr, "den", den)
    object.__setattr__(expr, "_text", f"{_bracket(num)}{sign}{_bracket(den)}")


def _bracket(dim: Dim) -> str:
    is_plain = isinstance(dim, Sym) or (isinstance(dim, int) and dim >= 0)
    return str(dim) if is_plain else f"({dim})"


def _sum_text(terms: tuple[tuple[_Atoms, int], ...]) -> str:
    parts: list[str] = []
    for atoms, coefficient in terms:
        sign = "-" if coefficient < 0 else "+"
        size = abs(coefficient)
        factors = [_bracket(atom) for atom in atoms] if len(atoms) > 1 or size != 1 else [str(a) for a in atoms]
        if size != 1 or not atoms:
            factors.insert(0, str(size))
        elif sign == "-" and not parts:
            factors[0] = _bracket(atoms[0])  # -(a // b), not (-a) // b
        parts.append(f" {sign} {'*'.join(factors)}" if parts else f"{sign.strip('+')}{'*'.join(factors)}")
    return "".join(parts)


def _terms(dim: Dim) -> dict[_Atoms, int]:
    if isinstance(dim, int):
        return {(): int(dim)} if dim else {}
    return dict(dim.terms) if isinstance(dim, Poly) else {(dim,): 1}


def _build(terms: Mapping[_Atoms, int]) -> Dim:
    kept = {atoms: coefficient for atoms, coefficient in terms.items() if coefficient}
    if len(kept) > MAX_TERMS:
        raise IRError(f"a dim formula multiplies out to {len(kept)} terms (at most {MAX_TERMS})")
    if not kept:
        return 0
    if len(kept) > 1:
        return Poly(kept)
    ((atoms, coefficient),) = kept.items()
    if not atoms:
        return coefficient
    # A lone atom is not wrapped: `T + 0` must be the symbol T itself, or it would have two forms.
    return atoms[0] if len(atoms) == 1 and coefficient == 1 else Poly(kept)


# The arithmetic is cached because builders and passes apply the same few formulas to every layer.
@lru_cache(maxsize=1 << 14)
def _add(a: Dim, b: Dim) -> Dim:
    terms = _terms(a)
    for atoms, coefficient in _terms(b).items():
        terms[atoms] = terms.get(atoms, 0) + coefficient
    return _build(terms)


@lru_cache(maxsize=1 << 14)
def _mul(a: Dim, b: Dim) -> Dim:
    terms: dict[_Atoms, int] = {}
    for atoms_a, coefficient_a in _terms(a).items():
        for atoms_b, coefficient_b in _terms(b).items():
            atoms = tuple(sorted(atoms_a + atoms_b, key=str))
            terms[atoms] = terms.get(atoms, 0) + coefficient_a * coefficient_b
    return _build(terms)


@lru_cache(maxsize=1 << 12)
def _floordiv(a: Dim, b: Dim) -> Dim:
    whole, rest = _divide(a, b)
    if isinstance(rest, int) and (rest == 0 or isinstance(b, int)):
        return whole + (rest // b if rest else 0)
    return whole + Quotient(rest, b)  # exact, since floor(q + r / b) == q + floor(r / b) for an integer q


@lru_cache(maxsize=1 << 12)
def _mod(a: Dim, b: Dim) -> Dim:
    _, rest = _divide(a, b)
    if isinstance(rest, int) and (rest == 0 or isinstance(b, int)):
        return rest % b if rest else 0
    return Remainder(rest, b)


def _divide(a: Dim, b: Dim) -> tuple[Dim, Dim]:
    """(q, r) with a == q * b + r, where q has every term of a that b divides; floor((q*b + r) / b) == q + r // b.

    Only divisors of one term are tried: polynomial division would need an order of the symbols, and sizes are divided
    by constants and products.
    """
    if b == 0:
        raise ZeroDivisionError(f"dim {a} divided by zero")
    if a == b:
        return 1, 0
    divisor = _terms(b)
    if len(divisor) > 1:
        return 0, a
    ((atoms, coefficient),) = divisor.items()
    whole: dict[_Atoms, int] = {}
    rest: dict[_Atoms, int] = {}
    for term, factor in _terms(a).items():
        left = _without(term, atoms)
        if left is None or factor % coefficient:  # 3*T // 2 keeps 3*T: 1*T + T // 2 would be a second form
            rest[term] = factor
        else:
            whole[left] = factor // coefficient
    return _build(whole), _build(rest)


def _without(atoms: _Atoms, divisor: _Atoms) -> _Atoms | None:
    """The product atoms / divisor, or None if the divisor does not divide it."""
    if not divisor:
        return atoms
    counts = Counter(atoms)
    counts.subtract(divisor)
    if min(counts.values(), default=0) < 0:
        return None
    return tuple(sorted(counts.elements(), key=str))


def _lookup(sym: Sym, env: Mapping[str, object]) -> Dim:
    value = env.get(sym.name, sym)
    if not isinstance(value, (int, Expr)):
        raise TypeError(f"dim {sym}: expected a size, got {value!r}")
    return value


def _from_ast(node: ast.expr, text: str, depth: int) -> Dim:
    if depth and isinstance(node, ast.Name):
        return Sym(node.id)
    if depth and isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if depth and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_from_ast(node.operand, text, depth - 1)
    if depth and isinstance(node, ast.BinOp):
        left, right = _from_ast(node.left, text, depth - 1), _from_ast(node.right, text, depth - 1)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.FloorDiv():
                return left // right
            case ast.Mod():
                return left % right
    raise ParseError(f"{text!r} is not a dim formula: expected names, ints and + - * // %", 1, node.col_offset + 1)
