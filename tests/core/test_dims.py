"""Tests of symbolic sizes: the canonical form against integer arithmetic, and the text form against the size."""

import copy
import pickle

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sageLLM.runtime.core.errors import IRError, ParseError
from sageLLM.runtime.core.ir.dims import Dim, Expr, Poly, Sym, dims, evaluate, free_symbols, parse_dim, product

T, H, D, BS = dims("T H D BS")

OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}
LEAVES = st.one_of(st.integers(-9, 9), st.sampled_from(["T", "H", "D"]))
TREES = st.recursive(LEAVES, lambda inner: st.tuples(st.sampled_from(sorted(OPERATORS)), inner, inner), max_leaves=8)
SIZES = st.fixed_dictionaries({name: st.integers(1, 50) for name in ("T", "H", "D")})


def build(tree: object, leaf: object) -> object:
    """A formula or a number from a tree of operators, with `leaf` for the symbols."""
    if isinstance(tree, tuple):
        sign, left, right = tree
        return OPERATORS[sign](build(left, leaf), build(right, leaf))
    return tree if isinstance(tree, int) else leaf(tree)


@given(TREES, SIZES)
@settings(max_examples=500)
def test_formula_evaluates_as_its_integers_do(tree: object, sizes: dict[str, int]) -> None:
    try:
        number = build(tree, sizes.__getitem__)
        formula = build(tree, Sym)
    except ZeroDivisionError:
        assume(False)
    assert evaluate(formula, sizes) == number


@given(TREES)
@settings(max_examples=500)
def test_text_round_trip(tree: object) -> None:
    try:
        formula = build(tree, Sym)
    except ZeroDivisionError:
        assume(False)
    assert parse_dim(str(formula)) == formula
    assert hash(parse_dim(str(formula))) == hash(formula)


@given(TREES, SIZES, st.sampled_from(["T", "H", "D"]))
def test_binding_in_two_steps_is_binding_at_once(tree: object, sizes: dict[str, int], first: str) -> None:
    try:
        number = build(tree, sizes.__getitem__)
        formula = build(tree, Sym)
        partly = evaluate(formula, {first: sizes[first]})
    except ZeroDivisionError:
        assume(False)
    assert first not in free_symbols(partly)
    assert evaluate(partly, sizes) == number


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (T + T, "2*T"),
        (2 * T - T, "T"),
        ((H + 2 * D) * BS, "2*BS*D + BS*H"),
        (2 * H // 2, "H"),
        (H * D // D, "H"),
        ((T + BS - 1) // BS, "(T - 1)//BS + 1"),
        (-(T // 2), "-(T//2)"),
        (1 - T, "-T + 1"),
        (3 * (T // 2) * H - T % 4, "3*H*(T//2) - T%4"),
        ((T % 4) // H, "(T%4)//H"),
    ],
)
def test_text_is_canonical(formula: Dim, text: str) -> None:
    assert str(formula) == text


def test_constant_formulas_fold_to_ints() -> None:
    assert T - T == 0
    assert type(T - T) is int
    assert (4 * T) % 2 == 0
    assert T // T == 1
    assert (T + H) // (H + T) == 1
    assert product((2, T, 3)) == 6 * T
    assert product(()) == 1


def test_substitution_is_simultaneous() -> None:
    assert evaluate(T + 2 * H, {"T": H, "H": T}) == H + 2 * T


def test_copies_are_equal() -> None:
    formula = (T + 5) // BS * H
    assert copy.deepcopy(formula) == formula
    assert pickle.loads(pickle.dumps(formula)) == formula


def test_formulas_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match=r"dim formulas are immutable \(setting 'x' of T\)"):
        T.x = 1


@pytest.mark.parametrize("bad", [1.5, "T", None])
def test_only_sizes_mix_with_sizes(bad: object) -> None:
    with pytest.raises(TypeError):
        T + bad
    with pytest.raises(TypeError):
        bad * T


def test_a_symbol_bound_to_no_size_is_refused() -> None:
    with pytest.raises(TypeError, match="dim T: expected a size, got 'f32'"):
        evaluate(T + 1, {"T": "f32"})


def test_division_by_zero() -> None:
    with pytest.raises(ZeroDivisionError, match="dim T divided by zero"):
        T // 0


@pytest.mark.parametrize("name", ["", "2x", "a b", "for", "ﬁ", "x.y"])
def test_names_are_ascii_identifiers(name: str) -> None:
    with pytest.raises(IRError, match="cannot name a dim: expected an ASCII identifier"):
        Sym(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1:1: '' is not a dim formula"),
        ("T +", "1:1: 'T +' is not a dim formula"),
        ("T ** 2", "1:1: 'T ** 2' is not a dim formula: expected names, ints and + - * // %"),
        ("H + f(T)", "1:5: 'H + f(T)' is not a dim formula: expected names, ints and + - * // %"),
        ("H / 2", "1:1: 'H / 2' is not a dim formula: expected names, ints and + - * // %"),
        ("True", "1:1: 'True' is not a dim formula: expected names, ints and + - * // %"),
        ("T // 0", "1:1: 'T // 0' divides by zero"),
        ("-" * 100 + "T", f"1:65: {'-' * 100 + 'T'!r} is not a dim formula: expected names, ints and + - * // %"),
        ("T+" * 1500 + "T", "1:1: a dim formula of 3001 characters is too long (at most 2000)"),
    ],
)
def test_invalid_formula_text(text: str, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_dim(text)
    assert str(caught.value) == message


def test_a_formula_with_too_many_terms_is_rejected() -> None:
    factor = "*".join(["(a+b+c+d+e+f+g+h)"] * 8)
    with pytest.raises(IRError, match=r"a dim formula multiplies out to \d+ terms"):
        parse_dim(factor)


def test_terms_keep_one_order() -> None:
    one, other = T * H + D + 3, 3 + D + H * T
    assert isinstance(one, Poly)
    assert isinstance(other, Expr)
    assert one == other
    assert str(one) == str(other) == "H*T + D + 3"
