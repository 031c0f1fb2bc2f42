"""Partial sums under tensor parallelism: derived from the equations of ops, declared for references."""

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.expr.partial_sums import NotLinear, SumState
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.link.partial_sums import Argument, result_states
from sageLLM.codegen.model.op import OpDef

T, H, F, X, A = (Size.symbol(name) for name in ("T", "H", "F", "X", "A"))
DIVIDES = frozenset({"F"})  # F is divided over the ranks
COMPLETE, PARTIAL = SumState.COMPLETE, SumState.PARTIAL


@pytest.fixture(scope="module")
def ops(memo: LinkMemo) -> dict[str, OpDef]:
    return dict(driver.load_and_link(memo=memo).ops)


def rows(width: Size, state: SumState = COMPLETE) -> Argument:
    return Argument(ValueType("E", (T, width)), state)


def weight(*dims: Size, state: SumState = COMPLETE, is_certain: bool = True) -> Argument:
    return Argument(ValueType("E", dims), state, is_certain)


ROUTED = Argument(ValueType("i32", (T, A)))
LINEAR: list[tuple[str, dict[str, Argument], tuple[SumState, ...]]] = [
    ("linear", {"x": rows(F), "w": weight(H, F)}, (PARTIAL,)),
    ("linear", {"x": rows(F), "w": weight(H, F), "bias": weight(H, state=PARTIAL)}, (PARTIAL,)),
    ("linear", {"x": rows(H), "w": weight(F, H), "bias": weight(F)}, (COMPLETE,)),
    ("linear", {"x": rows(H, PARTIAL), "w": weight(X, H)}, (PARTIAL,)),
    ("add", {"x": rows(H, PARTIAL), "y": rows(H, PARTIAL)}, (PARTIAL,)),
    ("scale", {"x": rows(H, PARTIAL)}, (PARTIAL,)),
    ("mul", {"x": rows(H, PARTIAL), "y": rows(H)}, (PARTIAL,)),
    ("mul_rows", {"x": rows(H, PARTIAL), "gate": rows(Size.of(1))}, (PARTIAL,)),
    ("select_rows", {"x": rows(H, PARTIAL), "rows": Argument(ValueType("i32", (X,)))}, (PARTIAL,)),
    ("split_halves", {"x": rows(Size.of(2) * H, PARTIAL)}, (PARTIAL, PARTIAL)),
    ("concat_last", {"a": rows(H, PARTIAL), "b": rows(X, PARTIAL)}, (PARTIAL,)),
    ("silu_mul", {"gu": rows(Size.of(2) * F)}, (COMPLETE,)),
    ("rms_norm", {"x": rows(H), "w": weight(H)}, (COMPLETE,)),
    ("fused_add_rms_norm", {"x": rows(H), "residual": rows(H), "w": weight(H)}, (COMPLETE, COMPLETE)),
    ("expert_linear", {"x": rows(H), "experts": ROUTED, "w": weight(X, F, H), "bias": weight(X, F)}, (COMPLETE,)),
    ("expert_down", {"x": weight(T, A, F), "experts": ROUTED, "w": weight(X, H, F)}, (PARTIAL,)),
    (
        "expert_down",
        {"x": weight(T, A, F), "experts": ROUTED, "w": weight(X, H, F), "bias": weight(X, H, state=PARTIAL)},
        (PARTIAL,),
    ),
    (
        "combine_experts",
        {"x": weight(T, A, H, state=PARTIAL), "weights": Argument(ValueType("f32", (T, A)))},
        (PARTIAL,),
    ),
]
REFUSED: list[tuple[str, dict[str, Argument], str, set[str]]] = [
    ("linear", {"x": rows(F), "w": weight(H, F), "bias": weight(H)}, "a complete value is added", {"bias"}),
    (
        "linear",
        {"x": rows(F), "w": weight(H, F), "bias": weight(H, is_certain=False)},
        "a complete value is added",
        {"bias"},
    ),
    ("linear", {"x": rows(H, PARTIAL), "w": weight(X, H, state=PARTIAL)}, "it multiplies two partial sums", set()),
    (
        "linear",
        {"x": rows(F, PARTIAL), "w": weight(H, F)},
        "`dot` contracts K, which is divided over the ranks, over",
        set(),
    ),
    ("add", {"x": rows(H, PARTIAL), "y": rows(H)}, "a complete value is added", {"y"}),
    ("mul", {"x": rows(H, PARTIAL), "y": rows(H, PARTIAL)}, "it multiplies two partial sums", set()),
    ("mul_rows", {"x": rows(H, PARTIAL), "gate": rows(Size.of(1), PARTIAL)}, "it multiplies two partial sums", set()),
    ("gelu", {"x": rows(H, PARTIAL)}, "`erf` is not linear", set()),
    ("silu_mul", {"gu": rows(Size.of(2) * H, PARTIAL)}, "`sigmoid` is not linear", set()),
    ("rms_norm", {"x": rows(F), "w": weight(F)}, "`mean` reduces H, which is divided over the ranks", set()),
    ("layer_norm", {"x": rows(F)}, "`mean` reduces H, which is divided over the ranks", set()),
    (
        "fused_add_rms_norm",
        {"x": rows(H, PARTIAL), "residual": rows(H), "w": weight(H)},
        "a complete value is added",
        {"y"},
    ),
    ("fused_add_rms_norm", {"x": rows(F), "residual": rows(F), "w": weight(F)}, "`mean` reduces H", set()),
    (
        "concat_last",
        {"a": rows(H, PARTIAL), "b": rows(X)},
        "'y' would be complete in some views and partial in others",
        {"b"},
    ),
    ("expert_linear", {"x": rows(H), "experts": ROUTED, "w": weight(F, X, H)}, "it requires all of X", set()),
    (
        "expert_down",
        {"x": weight(T, A, F), "experts": ROUTED, "w": weight(X, H, F), "bias": weight(X, H)},
        "a complete value is added",
        {"bias"},
    ),
    ("topk_router", {"logits": rows(X, PARTIAL)}, "`topk_router` is not linear", set()),
]


@pytest.mark.parametrize(("name", "arguments", "states"), LINEAR)
def test_linear_ops_pass_partial_sums_on(
    ops: dict[str, OpDef], name: str, arguments: dict[str, Argument], states: tuple[SumState, ...]
) -> None:
    assert result_states(ops[name], arguments, {}, DIVIDES, ops) == states


@pytest.mark.parametrize(("name", "arguments", "reason", "added"), REFUSED)
def test_other_ops_refuse_partial_sums(
    ops: dict[str, OpDef], name: str, arguments: dict[str, Argument], reason: str, added: set[str]
) -> None:
    with pytest.raises(NotLinear) as caught:
        result_states(ops[name], arguments, {}, DIVIDES, ops)
    assert reason in str(caught.value)
    assert set(caught.value.added) == added
