"""Tests of the compute language: sizes, typed trees, and that no text raises anything but a diagnostic."""

import ast
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sageLLM.codegen.diagnostics import Sink, Span
from sageLLM.codegen.expr.check import Checker
from sageLLM.codegen.expr.cost import ELEMENT_BYTES
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.size import LEADING, Size, formula, volume
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.tree import Binary, Expr, Gather, IfPresent, Reduce, walk
from sageLLM.codegen.expr.types import ValueType, parse_dim, parse_type
from sageLLM.runtime.core.ir.types import DTYPES

DIMS = dict.fromkeys(["T", "H", "I", "N", "D", "V", "K"])
T, H, D, V = (Size.symbol(name) for name in "THDV")


def text_of(value: str) -> Text:
    return Text(value, lambda offset, width: Span("spec.yaml", 1, offset + 1, width), Sink())


def size(value: str) -> Size:
    return parse_dim(text_of(value), DIMS)


def scope() -> Scope:
    values = {
        "x": ValueType("E", (LEADING, H)),
        "w": ValueType("E", (H,)),
        "t": ValueType("f32", (V, D)),
        "i": ValueType("i32", (T,)),
    }
    attrs = {"eps": ValueType("float"), "n": ValueType("int"), "cap": ValueType("float")}
    return Scope(values, attrs, DIMS, {"E": ("f16", "bf16", "f32", "f64")}, frozenset({"cap"}))


def checked(value: str) -> Expr:
    text = text_of(value)
    return Checker(text, scope()).expression(parse_expression(text))


def finding(value: str) -> tuple[str, int, int]:
    """Code, column and width of the finding about an expression."""
    text = text_of(value)
    with pytest.raises(Refused):
        Checker(text, scope()).expression(parse_expression(text))
    (found,) = text.sink.diagnostics
    assert found.span is not None
    return found.code, found.span.column, found.span.width


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("2*I - I", "I"),
        ("D - D/2", "D/2"),
        ("(N + 2*K)*D", "N*D + 2*K*D"),
        ("(T + 1)*(T - 1)", "T*T - 1"),
        ("H/2*2", "H"),
    ],
)
def test_equal_sizes(left: str, right: str) -> None:
    assert size(left) == size(right)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("H", "H"),
        ("2*I", "2 * I"),
        ("D/2", "D // 2"),
        ("T*H + H", "H * (T + 1)"),
        ("T - T", "0"),
        ("T*D/2", "(D * T) // 2"),
    ],
)
def test_formula(value: str, text: str) -> None:
    assert formula(size(value)) == text


@given(
    st.lists(st.tuples(st.sampled_from("THD"), st.integers(-9, 9)), max_size=5), st.integers(1, 9), st.integers(1, 9)
)
def test_arithmetic_agrees_with_numbers(terms: list[tuple[str, int]], a: int, b: int) -> None:
    env = {"T": a, "H": b, "D": a + b}
    total = sum((Size.symbol(name) * Size.of(factor) for name, factor in terms), Size.of(0))
    wanted = sum(env[name] * factor for name, factor in terms)
    assert total.evaluate(env) == wanted
    assert (total * total - total).evaluate(env) == wanted * wanted - wanted
    assert eval(formula(total), {"__builtins__": {}}, env) == wanted


def test_solve() -> None:
    assert size("2*I").solve("I", T) == T.divided_by(2)
    assert size("T + H").solve("H", D) == D - T
    assert size("T*H").solve("H", D) is None


def test_types() -> None:
    assert parse_type(text_of("E[..., 2*I]"), {"E": ()}, DIMS) == ValueType("E", (LEADING, size("2*I")))
    assert volume((LEADING, H)) == Size.symbol("R") * H


def test_dims_go_by_name() -> None:
    assert checked("x * w").type == ValueType("E", (LEADING, H))
    assert checked("f32(w) * sum(t, V)").type.dims == (H, D)
    assert checked("gather(t, V, i)").type == ValueType("f32", (T, D))
    assert checked("dot(x, w, H)").type == ValueType("f32", (LEADING,))


def test_literals_adapt() -> None:
    assert checked("x * 2").type.element == "E"
    assert checked("f32(x) + eps").type.element == "f32"
    assert checked("i + n").type.element == "i32"
    assert checked("V - 1").type.element == "int"


def test_tree_names_no_target() -> None:
    tree = checked("optional(cap, mean(f32(x), H) + cap, mean(f32(x), H))")
    assert isinstance(tree, IfPresent)
    assert [type(node) for node in walk(tree) if isinstance(node, Binary | Reduce)] == [Binary, Reduce, Reduce]
    assert isinstance(checked("gather(t, V, i)"), Gather)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x + f32(w)", ("SAGE107", 1, 10)),
        ("i + 0.5", ("SAGE107", 1, 7)),
        ("i / 2", ("SAGE107", 1, 5)),
        ("x // 2", ("SAGE107", 1, 6)),
        ("f32(x) + y", ("SAGE104", 10, 1)),
        ("sum(f32(x), D)", ("SAGE108", 13, 1)),
        ("x.shape", ("SAGE102", 1, 7)),
        ("x if eps else w", ("SAGE102", 1, 15)),
        ("a < b < c", ("SAGE102", 1, 9)),
        ("x @ w", ("SAGE102", 1, 5)),
        ("[x, w]", ("SAGE102", 1, 6)),
        ("exp(i)", ("SAGE107", 5, 1)),
        ("x * cap", ("SAGE131", 5, 3)),
        ("optional(eps, x, x)", ("SAGE131", 10, 3)),
        ("where(x, x, x)", ("SAGE107", 7, 1)),
        ("gather(t, V, x)", ("SAGE107", 14, 1)),
        ("f32(eps)", ("SAGE107", 5, 3)),
        ("exp(f32(x)", ("SAGE101", 4, 1)),
        ("x * 1e400", ("SAGE103", 5, 5)),
        ("'text'", ("", 0, 0)),
        ("x * \u03c0", ("SAGE101", 5, 1)),
    ],
)  # fmt: skip
def test_findings_point_to_the_place(value: str, expected: tuple[str, int, int]) -> None:
    if expected[0]:
        assert finding(value) == expected
    else:
        assert checked(value).type.element == "str"


def test_tokens_at_random_give_only_findings() -> None:
    source = random.Random(7)
    tokens = (
        "x w t i eps H V D f32 E sum dot gather optional cap ( ) ( ) , + * / - < == and not 0 1.5 lambda : [ ] . ..."
    )
    tokens += " 'a' ~ ** if else yield await { } = := 1e999 # \\ \x00 \u202e " + "9" * 30
    accepted = 0
    for _ in range(4000):
        text = text_of(" ".join(source.choices([*tokens.split(), "\n"], k=source.randint(1, 9))))
        try:
            Checker(text, scope()).expression(parse_expression(text))
            accepted += 1
        except Refused:
            assert text.sink.diagnostics
    assert 0 < accepted < 1000


def test_codegen_evaluates_nothing() -> None:
    folder = Path(__file__).parents[2] / "codegen"
    for path in folder.rglob("*.py"):
        called = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        names = {func.id for func in called if isinstance(func, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}, path.name


def test_generator_and_runtime_agree_on_the_size_of_an_element() -> None:
    """The two may not import each other, so each has the table; this keeps them one."""
    assert ELEMENT_BYTES == DTYPES
