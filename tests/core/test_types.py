"""Tests of matching operand types against patterns, and of the messages for mismatches."""

from typing import Any

import pytest

from sageLLM.runtime.core.errors import IRError, TypeMismatch
from sageLLM.runtime.core.ir.dims import Dim, dims
from sageLLM.runtime.core.ir.types import E, TensorType, TypePattern, bind, f32, i32, instantiate

T, H, I, K, N, D, P, B = dims("T H I K N D P B")


def t(dtype: str, *shape: Dim) -> TensorType:
    return TensorType(dtype, shape)


LINEAR = {"x": E[..., K], "w": E[N, K]}
ROPE = {"x": E[T, N, D], "pos": i32[T], "cos": f32[P, D // 2]}


def matched(patterns: dict[str, TypePattern], **types: TensorType) -> dict[str, Any]:
    env: dict[str, Any] = {}
    bind(patterns, types, env, op="op")
    return env


def test_symbols_elements_and_leading_dims_bind() -> None:
    env = matched(LINEAR, x=t("bf16", B, T, 48), w=t("bf16", 64, 48))
    assert env == {"E": "bf16", "...": (B, T), "K": 48, "N": 64}
    assert instantiate(E[..., N], env) == t("bf16", B, T, 64)


@pytest.mark.parametrize(
    ("pattern", "size", "solution"),
    [(2 * I, 48, 24), (2 * I, 2 * T, T), (D // 2, 32, 64), (I + 3, 10, 7), (3 * I - 1, 5, 2), (2 * I // 3, 4, 6)],
)
def test_a_compound_dim_is_solved(pattern: Dim, size: Dim, solution: Dim) -> None:
    (symbol,) = {"I", "D"} & {str(s) for s in (I, D) if str(s) in str(pattern)}
    assert matched({"x": E[pattern,]}, x=t("f32", size))[symbol] == solution


def test_a_compound_dim_waits_for_later_operands() -> None:
    patterns = {"flat": E[T, N * D], "q": E[T, N, D]}
    assert matched(patterns, flat=t("f32", 3, 64), q=t("f32", 3, 4, 16))["D"] == 16


def test_names_of_the_graph_are_not_captured() -> None:
    """The pattern's I is not the graph's I."""
    assert matched({"x": E[T, 2 * I]}, x=t("f32", I, 2 * T)) == {"E": "f32", "T": I, "I": T}


@pytest.mark.parametrize(
    ("patterns", "types", "message"),
    [
        (
            LINEAR,
            {"x": t("f32", T, 48), "w": t("f32", 64, 32)},
            "linear: operand 'w': expected E[N, K], got f32[64, 32] with K = 48 (from x)",
        ),
        (
            LINEAR,
            {"x": t("f32", T, 48), "w": t("bf16", 64, 32)},
            "linear: operand 'w': expected E[N, K], got bf16[64, 32] with E = f32 (from x), K = 48 (from x)",
        ),
        (
            LINEAR,
            {"x": t("f32", 48), "w": t("f32", 48)},
            "linear: operand 'w': expected E[N, K], got f32[48] of 2 dims",
        ),
        (LINEAR, {"x": t("f32")}, "linear: operand 'x': expected E[..., K], got f32[] of at least 1 dims"),
        (LINEAR, {"z": t("f32")}, "linear: unknown operand 'z', expected x, w"),
        (
            ROPE,
            {"x": t("f32", T, 4, 16), "pos": t("i64", T)},
            "linear: operand 'pos': expected i32[T], got i64[T]",
        ),
        (
            ROPE,
            {"x": t("f32", T, 4, 16), "cos": t("f32", 99, 16)},
            "linear: operand 'cos': expected f32[P, D//2], got f32[99, 16] with D//2 = 8, as D = 16 (from x)",
        ),
        (
            {"gu": E[T, 2 * I]},
            {"gu": t("f32", T, 7)},
            "linear: operand 'gu': expected E[T, 2*I], got f32[T, 7]; no I satisfies 2*I = 7",
        ),
        (
            {"x": E[T, N * D]},
            {"x": t("f32", T, 64)},
            "linear: operand 'x': expected E[T, D*N], got f32[T, 64]; D*N does not determine D and N",
        ),
        (
            {"x": E[H % 4,]},
            {"x": t("f32", 3)},
            "linear: operand 'x': expected E[H%4], got f32[3]; no H satisfies H%4 = 3",
        ),
        ({"x": E[T, 128]}, {"x": t("f32", T, 64)}, "linear: operand 'x': expected E[T, 128], got f32[T, 64]"),
        (
            {"x": E[..., H], "y": E[..., H]},
            {"x": t("f32", B, T, 8), "y": t("f32", T, 8)},
            "linear: operand 'y': expected E[..., H], got f32[T, 8] with ... = (B, T) (from x)",
        ),
    ],
)
def test_mismatch_messages(patterns: dict[str, TypePattern], types: dict[str, TensorType], message: str) -> None:
    with pytest.raises(TypeMismatch) as caught:
        bind(patterns, types, {}, op="linear")
    assert str(caught.value) == message


def test_an_attribute_that_binds_a_size_is_named() -> None:
    with pytest.raises(TypeMismatch, match=r"expected E\[N\], got f32\[4\] with N = 3 \(from an attribute\)"):
        bind({"x": E[N,]}, {"x": t("f32", 4)}, {"N": 3}, op="op")


def test_an_unbound_name_cannot_be_instantiated() -> None:
    with pytest.raises(TypeMismatch) as caught:
        instantiate(E[..., N], {"E": "f32"})
    assert str(caught.value) == "E[..., N] requires ..., N, which no operand or attribute binds"


def test_leading_dims_come_first() -> None:
    with pytest.raises(IRError, match=r"E\[H, ...\]: '...' must come first: it matches the leading dims"):
        E[H, ...]
