"""Attention-FFN disaggregation: published results, from the published shapes.

**afd-plugin.** DeepSeek-V3.2 with W8A8 weights on Ascend dies, decodes alone, in tokens per second and die
(vllm-project/afd-plugin at 2e4378f, recipe/npu/CAMP2pAFDConnector/deepseek_v3_2/README.md): 64 dies that do everything,
against 48 or 64 attention dies with 16 FFN dies, two micro-batches. The expert load of the latter is forced to that of
192 or 256 attention dies with 64 FFN dies, which are simulated here.

The die is that of the CloudMatrix384 paper (arXiv 2506.12708): half of an Ascend 910C. The launch time is the only
fitted figure: with it a step of the 64 dies with prompts of 16K takes 71 ms, and 68.8 ms as published. Every token
attends to its whole context, as `deepseek_v3` has no sparse attention.

A simulated step is never shorter with more attention dies per FFN die. The published one is, by 9 to 12 %, so the
published sizes of the gains cannot follow from a model of loads.

**FastAFD** (README of linsj20/FastAFD, July 2026): 1.35 to 1.45 times the decodes per GPU of a GB200 NVL72, with 96 and
48 requests per attention GPU at contexts of 8k and 16k, and with 72 and 36. So many fit on a GPU with the attention
weights of Qwen3-235B and MiniMax-M2.5. The division of the GPUs is an assumption: 64 attention and 8 FFN
GPUs, all of the rack, are compared with groups of 8 GPUs that do everything, on which fewer requests fit next to their
experts. Against larger groups the simulated gains are smaller, and there is none against groups of 32.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.cost import SECOND, Hardware, Link
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.attention_ffn_cost import AttentionFfn, AttentionFfnStepCost
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.scheduler.step_cost import StepWork

LAYOUT = MODELS["deepseek_v3"]
CONFIG = LAYOUT.read_config(HFConfig({"max_position_embeddings": 163840}))
DIE = Hardware(
    "ascend_910c_die",
    peak_flops={"i8": 7.52e14, "bf16": 3.76e14},
    memory_bandwidth=1.6e12,
    memory_bytes=64 * 2**30,
    launch_overhead_us=20.0,
    link=Link(1.96e11, 5.0),
    host_link=Link(2e10, 10.0),
)
NUM_FFN, NUM_EXPERT_DIES = 64, 64
MEAN_ANSWER = 1024
PUBLISHED = {  # requests per die alone and per attention die; tokens/s/die alone, with 48A16F, with 64A16F
    16384: (16, 28, 232.6, 220.3, 258.9),
    32768: (8, 14, 168.2, 151.4, 183.3),
}


def decodes(num: int, prompt_len: int) -> StepWork:
    """Decodes halfway through their answers. An element of KV has two bytes, twice those of the `i8` model."""
    return StepWork(num_decodes=num, num_context_tokens=num * 2 * (prompt_len + MEAN_ANSWER // 2))


@pytest.fixture(scope="module")
def whole() -> RooflineStepCost:
    return RooflineStepCost(LAYOUT, CONFIG, DIE, dtype="i8")


@pytest.fixture(scope="module")
def experts_divided() -> RooflineStepCost:
    return RooflineStepCost(LAYOUT, CONFIG, DIE, dtype="i8", expert_parallel_size=NUM_EXPERT_DIES)


def together_s(cost: RooflineStepCost, work: StepWork, element_bytes: float) -> float:
    """Seconds of a step of devices that do everything.

    A row is sent to the devices that have its experts, and comes back; our engine gathers all rows.
    """
    num_devices = cost.experts.num_workers
    num_copies = num_devices * (1 - (1 - 1 / num_devices) ** cost.experts.per_token)
    num_bytes = num_copies * work.num_decodes * cost.config.H * element_bytes
    return cost.step_s(work) + 2 * cost.num_moe_layers * cost.hardware.link.time_us(num_bytes) / SECOND


def dies_together_s(cost: RooflineStepCost, num: int, prompt_len: int) -> float:
    """As `together_s`: rows are sent as int8 and come back as bf16."""
    return together_s(cost, decodes(num, prompt_len), (1 + 2) / 2)


def test_the_step_of_the_published_baseline(experts_divided: RooflineStepCost) -> None:
    num, _, rate, *_ = PUBLISHED[16384]
    assert dies_together_s(experts_divided, num, 16384) == pytest.approx(num / rate, rel=0.05)


@pytest.mark.parametrize("prompt_len", PUBLISHED)
def test_the_signs_of_the_published_points(
    whole: RooflineStepCost, experts_divided: RooflineStepCost, prompt_len: int
) -> None:
    num_alone, num, rate_alone, *rates = PUBLISHED[prompt_len]
    alone = num_alone / dies_together_s(experts_divided, num_alone, prompt_len)
    steps = []
    for num_attention, rate in zip((192, 256), rates, strict=True):
        cost = AttentionFfnStepCost(whole, LAYOUT, AttentionFfn(num_attention, NUM_FFN, is_merged=True))
        steps.append(cost.step_s(decodes(num, prompt_len)))
        ours = num * num_attention / (num_attention + NUM_FFN) / steps[-1]
        assert (ours > alone) == (rate > rate_alone), (num_attention, ours / alone - 1, rate / rate_alone - 1)
    assert steps[0] <= steps[1], "more rows for each FFN die"


GB200 = replace(HARDWARE["b200"], memory_bytes=186 * 10**9)
SPARSE = {"num_experts_per_tok": 8, "head_dim": 128, "moe_intermediate_size": 1536, "max_position_embeddings": 40960}
QWEN3_235B = SPARSE | {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
    "num_experts": 128,
    "norm_topk_prob": True,
    "vocab_size": 151936,
}
MINIMAX_M2 = SPARSE | {
    "hidden_size": 3072,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "intermediate_size": 1536,
    "num_local_experts": 256,
    "rotary_dim": 64,
    "vocab_size": 200064,
}
BLOCK_SIZE = 16


@pytest.mark.parametrize(
    ("model", "values", "num_requests"), [("qwen3_moe", QWEN3_235B, (96, 48)), ("minimax_m2", MINIMAX_M2, (72, 36))]
)
def test_gains_on_a_rack(model: str, values: Mapping[str, Any], num_requests: tuple[int, int]) -> None:
    layout = MODELS[model]
    config = layout.read_config(HFConfig(values))
    cost = AttentionFfnStepCost(
        RooflineStepCost(layout, config, GB200), layout, AttentionFfn(64, 8, num_ubatches=2, is_merged=True)
    )
    group = RooflineStepCost(layout, config, GB200, expert_parallel_size=8)
    for context, published in zip((8192, 16384), num_requests, strict=True):
        num = cost.num_kv_blocks(BLOCK_SIZE) * BLOCK_SIZE // context
        assert published <= num < 1.08 * published
        num_alone = group.num_kv_blocks(BLOCK_SIZE) * BLOCK_SIZE // context
        alone = num_alone / together_s(group, StepWork((), num_alone, num_alone * context), 2)
        rate = 64 / 72 * published / cost.step_s(StepWork((), published, published * context))
        assert 1.25 < rate / alone < 1.5
