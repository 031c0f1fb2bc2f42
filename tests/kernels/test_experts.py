"""Routing and experts against loops over tokens, and against the routers of transformers."""

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from sageLLM.generated.kernels.reference import KERNELS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_experts(tokens: int, chosen: int, count: int, seed: int = 3) -> Tensor:
    """Distinct experts for every token; not every expert is among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(count - 1, generator=generator)[:chosen] for _ in range(tokens)]
    return torch.stack(rows).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_expert_linear_is_each_token_times_its_experts(dtype: torch.dtype, with_bias: bool) -> None:
    x, w, experts = random(11, 6).to(dtype), random(5, 4, 6, seed=1).to(dtype), some_experts(11, 3, 5)
    bias = random(5, 4, seed=2).to(dtype) if with_bias else None
    added = torch.zeros(5, 4, dtype=dtype) if bias is None else bias
    wanted = torch.stack([torch.stack([w[e] @ x[t] + added[e] for e in experts[t]]) for t in range(11)])
    torch.testing.assert_close(KERNELS["expert_linear"](x, experts, w, bias), wanted)


@pytest.mark.parametrize("with_bias", [False, True])
def test_expert_down_is_each_row_times_its_expert(with_bias: bool) -> None:
    x, w, experts = random(11, 3, 6), random(5, 4, 6, seed=1), some_experts(11, 3, 5)
    bias = random(5, 4, seed=2) if with_bias else None
    added = torch.zeros(5, 4, dtype=torch.float64) if bias is None else bias
    wanted = torch.stack(
        [torch.stack([w[e] @ x[t, a] + added[e] for a, e in enumerate(experts[t])]) for t in range(11)]
    )
    torch.testing.assert_close(KERNELS["expert_down"](x, experts, w, bias), wanted)


def test_experts_of_a_token_do_not_depend_on_the_batch() -> None:
    x, w, experts = random(11, 6).float(), random(5, 4, 6, seed=1).float(), some_experts(11, 3, 5)
    together = KERNELS["expert_linear"](x, experts, w)
    alone = torch.cat([KERNELS["expert_linear"](x[t : t + 1], experts[t : t + 1], w) for t in range(11)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert torch.equal(together, KERNELS["expert_linear"](x, experts, w))


def test_no_tokens() -> None:
    experts = torch.zeros(0, 2, dtype=torch.int32)
    assert KERNELS["expert_linear"](random(0, 6), experts, random(5, 4, 6)).shape == (0, 2, 4)


def test_combine() -> None:
    x, weights = random(11, 3, 6), random(11, 3, seed=1)
    torch.testing.assert_close(KERNELS["combine_experts"](x, weights), (x * weights.unsqueeze(-1)).sum(1))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_router_takes_the_best_scores(scoring: str, renormalize: bool) -> None:
    logits = random(13, 8)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    weights, experts = scores.topk(3, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    found = KERNELS["topk_router"](logits, A=3, scoring=scoring, renormalize=renormalize, factor=2.5)
    assert torch.equal(found[0], experts.to(torch.int32))
    torch.testing.assert_close(found[1], weights * 2.5)


def test_router_renormalized_is_the_softmax_of_the_chosen_logits() -> None:
    logits = random(13, 8).float()
    top, experts = logits.topk(3, -1)
    found = KERNELS["topk_router"](logits, A=3)
    assert torch.equal(found[0], experts.to(torch.int32))
    torch.testing.assert_close(found[1], top.softmax(-1))


def test_router_of_equal_scores_takes_the_first() -> None:
    experts, weights = KERNELS["topk_router"](torch.zeros(2, 6), A=3)
    assert experts.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))


def test_sigmoids_that_vanish_give_no_nan() -> None:
    weights = KERNELS["topk_router"](torch.full((1, 4), -200.0), A=2, scoring="sigmoid")[1]
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("renormalize", [False, True])
def test_grouped_router_equals_that_of_deepseek_v3(renormalize: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=10, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2,
        norm_topk_prob=renormalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    generator = torch.Generator().manual_seed(1)
    router.weight.data = torch.randn(12, 10, generator=generator)
    router.e_score_correction_bias = torch.randn(12, generator=generator)
    x = torch.randn(50, 10, generator=generator)
    _, weights, experts = router(x)
    logits = KERNELS["router_logits"](x, router.weight)
    found = KERNELS["topk_router"](
        logits, router.e_score_correction_bias, A=4, scoring="sigmoid", renormalize=renormalize, factor=2.5,
        groups=4, top_groups=2, group_score="top2",
    )  # fmt: skip
    by_expert = torch.zeros(50, 12).scatter_(1, experts, weights)
    torch.testing.assert_close(torch.zeros(50, 12).scatter_(1, found[0].long(), found[1]), by_expert)
