"""What ranks may do with parts of sums: derived from each op's equations, declared for references."""

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.expr.parts import NotLinear, Share
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.link.ranks import Argument, result_shares
from sageLLM.codegen.model.op import OpDef

T, H, F, X, A = (Size.symbol(name) for name in ("T", "H", "F", "X", "A"))
DIVIDES = frozenset({"F"})  # each rank has its share of F
WHOLE, PART = Share.WHOLE, Share.PART


@pytest.fixture(scope="module")
def ops() -> dict[str, OpDef]:
    return dict(driver.load_and_link().ops)


def rows(width: Size, share: Share = WHOLE) -> Argument:
    return Argument(ValueType("E", (T, width)), share)


def weight(*dims: Size, share: Share = WHOLE, is_certain: bool = True) -> Argument:
    return Argument(ValueType("E", dims), share, is_certain)


ROUTED = Argument(ValueType("i32", (T, A)))
LINEAR: list[tuple[str, dict[str, Argument], tuple[Share, ...]]] = [
    ("linear", {"x": rows(F), "w": weight(H, F)}, (PART,)),
    ("linear", {"x": rows(F), "w": weight(H, F), "bias": weight(H, share=PART)}, (PART,)),
    ("linear", {"x": rows(H), "w": weight(F, H), "bias": weight(F)}, (WHOLE,)),
    ("linear", {"x": rows(H, PART), "w": weight(X, H)}, (PART,)),
    ("add", {"x": rows(H, PART), "y": rows(H, PART)}, (PART,)),
    ("scale", {"x": rows(H, PART)}, (PART,)),
    ("mul", {"x": rows(H, PART), "y": rows(H)}, (PART,)),
    ("mul_rows", {"x": rows(H, PART), "gate": rows(Size.of(1))}, (PART,)),
    ("select_rows", {"x": rows(H, PART), "rows": Argument(ValueType("i32", (X,)))}, (PART,)),
    ("split_halves", {"x": rows(Size.of(2) * H, PART)}, (PART, PART)),
    ("concat_last", {"a": rows(H, PART), "b": rows(X, PART)}, (PART,)),
    ("silu_mul", {"gu": rows(Size.of(2) * F)}, (WHOLE,)),
    ("rms_norm", {"x": rows(H), "w": weight(H)}, (WHOLE,)),
    ("fused_add_rms_norm", {"x": rows(H), "residual": rows(H), "w": weight(H)}, (WHOLE, WHOLE)),
    ("expert_linear", {"x": rows(H), "experts": ROUTED, "w": weight(X, F, H), "bias": weight(X, F)}, (WHOLE,)),
    ("expert_down", {"x": weight(T, A, F), "experts": ROUTED, "w": weight(X, H, F)}, (PART,)),
    (
        "expert_down",
        {"x": weight(T, A, F), "experts": ROUTED, "w": weight(X, H, F), "bias": weight(X, H, share=PART)},
        (PART,),
    ),
    (
        "combine_experts",
        {"x": weight(T, A, H, share=PART), "weights": Argument(ValueType("f32", (T, A)))},
        (PART,),
    ),
]
REFUSED: list[tuple[str, dict[str, Argument], str, set[str]]] = [
    ("linear", {"x": rows(F), "w": weight(H, F), "bias": weight(H)}, "a whole value is added", {"bias"}),
    (
        "linear",
        {"x": rows(F), "w": weight(H, F), "bias": weight(H, is_certain=False)},
        "a whole value is added",
        {"bias"},
    ),
    ("linear", {"x": rows(H, PART), "w": weight(X, H, share=PART)}, "two parts are multiplied", set()),
    ("linear", {"x": rows(F, PART), "w": weight(H, F)}, "`dot` goes over K, of which a rank has a share, and", set()),
    ("add", {"x": rows(H, PART), "y": rows(H)}, "a whole value is added", {"y"}),
    ("mul", {"x": rows(H, PART), "y": rows(H, PART)}, "two parts are multiplied", set()),
    ("mul_rows", {"x": rows(H, PART), "gate": rows(Size.of(1), PART)}, "two parts are multiplied", set()),
    ("gelu", {"x": rows(H, PART)}, "`erf` is not linear", set()),
    ("silu_mul", {"gu": rows(Size.of(2) * H, PART)}, "`sigmoid` is not linear", set()),
    ("rms_norm", {"x": rows(F), "w": weight(F)}, "`mean` goes over H, of which a rank has a share", set()),
    ("layer_norm", {"x": rows(F)}, "`mean` goes over H, of which a rank has a share", set()),
    ("fused_add_rms_norm", {"x": rows(H, PART), "residual": rows(H), "w": weight(H)}, "a whole value is added", {"y"}),
    ("fused_add_rms_norm", {"x": rows(F), "residual": rows(F), "w": weight(F)}, "`mean` goes over H", set()),
    ("concat_last", {"a": rows(H, PART), "b": rows(X)}, "'y' is whole in some places and a part in others", {"b"}),
    ("expert_linear", {"x": rows(H), "experts": ROUTED, "w": weight(F, X, H)}, "it needs all of X", set()),
    (
        "expert_down",
        {"x": weight(T, A, F), "experts": ROUTED, "w": weight(X, H, F), "bias": weight(X, H)},
        "a whole value is added",
        {"bias"},
    ),
    ("topk_router", {"logits": rows(X, PART)}, "`topk_router` is not linear", set()),
]


@pytest.mark.parametrize(("name", "arguments", "shares"), LINEAR)
def test_parts_that_add_up(
    ops: dict[str, OpDef], name: str, arguments: dict[str, Argument], shares: tuple[Share, ...]
) -> None:
    assert result_shares(ops[name], arguments, {}, DIVIDES, ops) == shares


@pytest.mark.parametrize(("name", "arguments", "reason", "added"), REFUSED)
def test_parts_that_do_not_add_up(
    ops: dict[str, OpDef], name: str, arguments: dict[str, Argument], reason: str, added: set[str]
) -> None:
    with pytest.raises(NotLinear) as caught:
        result_shares(ops[name], arguments, {}, DIVIDES, ops)
    assert reason in str(caught.value)
    assert set(caught.value.added) == added
