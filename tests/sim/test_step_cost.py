"""Predicted step durations: coefficients computed by hand, and the roofline against the sum over the graph's nodes."""

import dataclasses

import pytest

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.cost import estimate
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.scheduler.step_cost import CoefficientCost, Coefficients, PromptChunk, StepWork

PLAIN = Coefficients((10.0, 0.1, 0.001), (5.0, 0.01, 0.2), (4.0, 0.01, 0.3), threshold=3)
BIG = {
    "hidden_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
}
LAYOUT = MODELS["llama"]
CONFIG = LAYOUT.read_config(HFConfig(BIG))
H100 = HARDWARE["h100"]
WORKS = [
    StepWork(num_decodes=1, num_context_tokens=100),
    StepWork(num_decodes=256, num_context_tokens=256_000),
    StepWork([PromptChunk(0, 2048)]),
    StepWork([PromptChunk(512, 512), PromptChunk(0, 30)], 64, 40_000),
]


def test_coefficients_by_hand() -> None:
    cost = CoefficientCost(PLAIN)
    assert cost.step_s(StepWork([PromptChunk(0, 100), PromptChunk(0, 50)])) == pytest.approx(0.0375)
    assert cost.step_s(StepWork(num_decodes=2, num_context_tokens=300)) == pytest.approx(0.0084)
    assert cost.step_s(StepWork(num_decodes=3, num_context_tokens=300)) == pytest.approx(0.0079)
    both = StepWork([PromptChunk(0, 100)], 2, 300)
    assert cost.step_s(both) == pytest.approx(0.0334), "the weights are read once"
    assert cost.step_s(StepWork()) == 0.0


def test_chunks_of_a_prompt_cost_its_quadratic_term_once() -> None:
    cost = CoefficientCost(dataclasses.replace(PLAIN, prefill=(0.0, 0.1, 0.001)))
    parts = [PromptChunk(0, 60), PromptChunk(60, 140)]
    whole = cost.step_s(StepWork([PromptChunk(0, 200)]))
    assert sum(cost.step_s(StepWork([part])) for part in parts) == pytest.approx(whole)


def test_overhead_counts_the_whole_context() -> None:
    cost = CoefficientCost(dataclasses.replace(PLAIN, prefill_overhead=(2.0, 0.01), decode_overhead=(1.0, 0.02)))
    assert cost.step_s(StepWork([PromptChunk(100, 100)])) == pytest.approx(0.001 * (10 + 2 + 10 + 30 + 2))
    assert cost.step_s(StepWork((), 1, 50)) == pytest.approx(0.001 * (5 + 1 + 0.5 + 1 + 0.2))


def summed(work: StepWork, cost: RooflineStepCost, tp: int) -> float:
    """The seconds of the step, summed over the nodes of the fused graph."""
    chunks = work.prefill
    env = {
        "Td": work.num_decodes,
        "Tp": work.num_prompt_tokens,
        "S": work.num_decodes + len(chunks),
        "KV": work.num_context_tokens + sum(s + n for s, n in chunks),
        "QK": work.num_context_tokens + sum(sum(range(s + 1, s + n + 1)) for s, n in chunks),
        "tp": tp,
    }
    return sum(estimate(node, H100, env).time_us for node in cost.graph.nodes.values()) / 1e6


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("work", WORKS)
def test_the_roofline_is_the_sum_over_the_graph(work: StepWork, tp: int) -> None:
    cost = RooflineStepCost(LAYOUT, CONFIG, H100, tensor_parallel_size=tp)
    assert cost.step_s(work) == pytest.approx(summed(work, cost, tp), rel=1e-6)


def test_fusion_makes_a_step_shorter_than_its_plain_ops() -> None:
    plain = expand(build_block_graph(LAYOUT, CONFIG, "decode", ParallelConfig()), LAYOUT, CONFIG)
    env = {"T": 8, "B": 8, "S": 8, "KV": 800}
    unfused = sum(estimate(node, H100, env).time_us for node in plain.nodes.values() if isinstance(node, OpNode)) / 1e6
    assert RooflineStepCost(LAYOUT, CONFIG, H100).step_s(StepWork((), 8, 800)) < unfused


def test_memory_left_for_kv() -> None:
    cost = RooflineStepCost(LAYOUT, CONFIG, H100)
    layer = (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096) * 2
    assert cost.weight_bytes == 4 * layer + (2 * 32000 * 4096 + 4096) * 2
    assert cost.kv_bytes_per_token == 4 * 2 * 8 * 128 * 2
    assert cost.num_kv_blocks(16) == int((H100.memory_bytes * 0.9 - cost.weight_bytes) // (16 * 16384))
    assert cost.transfer_s(1000) == pytest.approx(3e-6 + 16384e3 / 4.5e11)
    small = dataclasses.replace(H100, memory_bytes=10**9)
    assert RooflineStepCost(LAYOUT, CONFIG, small).num_kv_blocks(16) == 0


def test_a_degree_that_does_not_divide_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="3"):
        RooflineStepCost(LAYOUT, CONFIG, H100, tensor_parallel_size=3)
