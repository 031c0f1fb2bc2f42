"""Conditions that never hold: what is reported, and that no condition with a solution is."""

import ast
from collections.abc import Sequence
from random import Random

import pytest

from sageLLM.codegen.expr.constants import OutOfRange, constant
from sageLLM.codegen.expr.satisfiable import Kind, Optional, may_hold

KINDS: dict[str, Kind | Optional | Sequence[object]] = {
    **dict.fromkeys("HWDX", "size"), "n": "int", "f": "float", "act": "text", "b": "bool", "w": Optional("int"),
    "i": "index", "how": ("up", "down"),
}  # fmt: skip


def holds(text: str) -> bool:
    return may_hold(ast.parse(text, mode="eval").body, lambda leaf: KINDS.get(leaf, "any"))


@pytest.mark.parametrize(
    "text",
    [
        "H < 1", "H < H", "1 > 2", "H % 7 == 9", "D // 2 > D", "n % 2 == 3", "i < 0", "b and not b", "abs(f) < 0.0",
        "f > 0.5 and f < 0.4", "act == 'a' and act == 'b'", "how == 'left'", "sqrt(f) < 0.0", "H / 0 == 1",
        "min(H, W) > max(H, W)", "H == 5120 and W == 11008 and D == 0",
    ],
)  # fmt: skip
def test_never(text: str) -> None:
    assert not holds(text)


@pytest.mark.parametrize(
    "text",
    [
        "H == 5120", "H == 512 * 1024", "H * 2 == 5120", "H % 96 == 5 and H > 100000", "n == 2**31", "n < -5",
        "w is null", "w >= 1", "w is not null and w > 7", "act in ['a', 'b']", "act not in ['a', 'b']", "H in sizes",
        "kinds[i] == 'x'", "H * W == X * D and H != X",
        "H == 5120 and W == 11008 and D == 32", "f == 0.125", "(H if b else W) == 3",
    ],
)  # fmt: skip
def test_sometimes(text: str) -> None:
    assert holds(text)


@pytest.mark.parametrize("seed", range(40))
def test_a_condition_with_a_solution_is_never_reported(seed: int) -> None:
    random = Random(seed)
    values = {name: random.choice([1, 3, 17, 96, 1000, 5120, 2**20 + 7]) for name in "HWD"}

    def true_part() -> str:
        name, other = random.sample(list(values), 2)
        value, divisor = values[name], random.choice([2, 3, 16, 100])
        return random.choice(
            [
                f"{name} == {value}",
                f"{name} % {divisor} == {value % divisor}",
                f"{name} {'<=' if value <= values[other] else '>'} {other}",
                f"{name} * 2 + 1 == {2 * value + 1}",
                f"{name} - {other} == {value - values[other]}",
                f"not {name} < {value}",
                f"({name} > {value} or {other} == {values[other]})",
            ]
        )

    text = " and ".join(true_part() for _ in range(random.randint(1, 4)))
    assert eval(text, dict(values))
    assert holds(text), text


@pytest.mark.parametrize(
    "text", ["9**9**9", "1.0 / 0.0", "5 % 0", "2**53 + 1", "1e308 * 10.0", "(-2.0) ** 0.5", "10**5000"]
)
def test_constants_without_a_value(text: str) -> None:
    with pytest.raises(OutOfRange):
        constant(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("text", ["2**10", "0.5 ** 4", "-3 // 2", "(-2) ** 3", "2 ** -1", "1_000 % 7", "2**53"])
def test_constants_are_those_of_python(text: str) -> None:
    assert constant(ast.parse(text, mode="eval").body) == eval(text)


def test_names_are_not_constant() -> None:
    assert constant(ast.parse("2 * H", mode="eval").body) is None
