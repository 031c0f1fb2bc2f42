"""Predicted step durations: coefficients computed by hand, and the roofline against the sum over the graph's nodes."""

import dataclasses

import pytest

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.ops import OPS
from sageLLM.runtime.core.cost import Efficiency, Hardware, Link, estimate
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.kv_form import KV_FORMS
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.execution_graph.stage_sizes import choose_sizes
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost, stage_weight_bytes
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


def bare(hardware: Hardware) -> Hardware:
    """The device without fitted efficiencies."""
    return dataclasses.replace(hardware, efficiency={})


def env_of(work: StepWork, tp: int) -> dict[str, int]:
    """The symbols of the step."""
    chunks = work.prefill
    return {
        "Td": work.num_decodes,
        "Tp": work.num_prompt_tokens,
        "S": work.num_decodes + len(chunks),
        "KV": work.num_context_tokens + sum(s + n for s, n in chunks),
        "QK": work.num_context_tokens + sum(sum(range(s + 1, s + n + 1)) for s, n in chunks),
        "tp": tp,
    }


def summed(work: StepWork, cost: RooflineStepCost, tp: int) -> float:
    """The seconds of the step, summed over the nodes of the graph; attention by phase, in one launch."""
    hardware = cost.hardware
    phases = [StepWork(work.prefill), StepWork((), work.num_decodes, work.num_context_tokens)]
    total_us = 0.0
    for node in cost.graph.nodes.values():
        if isinstance(node, OpNode) and "attention" in node.tags:
            launch_us = hardware.launch_overhead_us
            parts = [estimate(node, hardware, env_of(phase, tp)).time_us - launch_us for phase in phases]
            total_us += sum(parts) + launch_us
        else:
            total_us += estimate(node, hardware, env_of(work, tp)).time_us
    return total_us / 1e6


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("is_fused", [True, False])
def test_the_roofline_is_the_sum_over_the_graph(work: StepWork, tp: int, is_fused: bool) -> None:
    cost = RooflineStepCost(LAYOUT, CONFIG, bare(H100), tensor_parallel_size=tp, is_fused=is_fused)
    assert cost.step_s(work) == pytest.approx(summed(work, cost, tp), rel=1e-6)
    linked = dataclasses.replace(bare(H100), link=Link(1e30, 0.0), launch_overhead_us=0.0)
    free = RooflineStepCost(LAYOUT, CONFIG, linked, tensor_parallel_size=tp, is_fused=is_fused)
    assert free.link_s(work) == pytest.approx(0.0) and (cost.link_s(work) > 0) is (tp > 1)


SLOW_FAMILIES = {
    "gemm": Efficiency(compute=0.5, memory=0.25, overlap=2.0, launch_us=5.0),
    "default": Efficiency(memory=0.125, launch_us=3.0),
    "prefill_attn": Efficiency(compute=0.1, launch_us=10.0, context_ns=20.0),
    "decode_attn": Efficiency(memory=0.2, launch_us=11.0, context_ns=30.0),
    "mixed_attn": Efficiency(memory=0.05, launch_us=12.0, context_ns=40.0, sequence_us=1.5),
}


@pytest.mark.parametrize("work", WORKS)
def test_every_family_has_its_efficiency(work: StepWork) -> None:
    hardware = dataclasses.replace(H100, efficiency=SLOW_FAMILIES)
    cost = RooflineStepCost(LAYOUT, CONFIG, hardware)
    phase = "prefill_attn" if not work.num_decodes else "mixed_attn" if work.prefill else "decode_attn"
    family = SLOW_FAMILIES[phase]
    total_us = 0.0
    for node in cost.graph.nodes.values():
        if not (isinstance(node, OpNode) and "attention" in node.tags):
            total_us += estimate(node, hardware, env_of(work, 1)).time_us
            continue
        prompts, decodes = env_of(StepWork(work.prefill), 1), env_of(StepWork((), *work_of_decodes(work)), 1)
        for env, name in ((prompts, "prefill_attn"), (decodes, phase)):
            flops, num_bytes = node.flops(env), node.bytes_moved(env)
            assert isinstance(flops, int) and isinstance(num_bytes, int)
            total_us += 1e6 * SLOW_FAMILIES[name].combined(flops / H100.peak_of("bf16"), num_bytes / 3e12)
        mean = work.num_context_tokens / max(work.num_decodes, 1)
        longest = max([mean, *(start + num for start, num in work.prefill)])
        total_us += (family.launch_us or 0) + family.context_ns * longest / 1e3 + family.sequence_us * work.num_decodes
    assert cost.step_s(work) == pytest.approx(total_us / 1e6, rel=1e-6)


def work_of_decodes(work: StepWork) -> tuple[int, int]:
    return work.num_decodes, work.num_context_tokens


def test_a_step_reads_the_experts_that_its_tokens_select() -> None:
    """Of 64 experts one token selects 2, many tokens all."""
    mixture = BIG | {"num_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 2048, "head_dim": 128}
    layout = MODELS["qwen3_moe"]
    config = layout.read_config(HFConfig(mixture))
    cost = RooflineStepCost(layout, config, bare(H100))
    assert cost.experts.num_selected(1) == pytest.approx(2.0)
    assert cost.experts.num_selected(2) == pytest.approx(2.0 + 2.0 * 62 / 64)
    assert cost.experts.num_selected(10_000) == pytest.approx(64.0)
    expert_bytes = 4 * 3 * 4096 * 2048 * 2
    one, many = (cost.step_s(StepWork((), n, n)) for n in (1, 200))
    read = cost.experts.num_selected(200) - 2
    assert many - one == pytest.approx(read * expert_bytes / 3e12, rel=0.05)
    shared = RooflineStepCost(layout, config, bare(H100), expert_parallel_size=4)
    assert cost.weight_bytes - shared.weight_bytes == 64 * expert_bytes * 3 // 4
    assert shared.experts.num_selected(1) == pytest.approx(cost.experts.num_selected(4) / 4)
    assert shared.step_s(StepWork((), 200, 200)) < cost.step_s(StepWork((), 200, 200)) / 2
    link_us = H100.link.time_us(3 * 200 * 4096 * 2, 3)
    assert shared.exchange_s(StepWork((), 200, 200)) == pytest.approx(4 * 2 * link_us / 1e6)
    assert cost.exchange_s(StepWork((), 200, 200)) == 0.0


def test_fusion_makes_a_step_shorter_than_its_plain_ops() -> None:
    plain = expand(build_block_graph(LAYOUT, CONFIG, "decode", ParallelConfig()), LAYOUT, CONFIG)
    env = {"T": 8, "B": 8, "S": 8, "KV": 800}
    unfused = sum(estimate(node, H100, env).time_us for node in plain.nodes.values() if isinstance(node, OpNode)) / 1e6
    assert RooflineStepCost(LAYOUT, CONFIG, H100).step_s(StepWork((), 8, 800)) < unfused


def test_fusions_for_steps_of_few_rows_do_not_count() -> None:
    """A norm in the projection after it is computed once per program: a prompt has separate kernels."""
    ops = {getattr(node, "op", None) for node in RooflineStepCost(LAYOUT, CONFIG, H100).graph.nodes.values()}
    assert "add_rms_norm_linear_silu_mul" in OPS and "fused_add_rms_norm" in ops
    assert not {name for name in ops if name and "norm_linear" in name}


def test_memory_left_for_kv() -> None:
    cost = RooflineStepCost(LAYOUT, CONFIG, H100)
    layer = (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096) * 2
    assert cost.weight_bytes == 4 * layer + (2 * 32000 * 4096 + 4096) * 2
    assert cost.kv_bytes_per_token == 4 * 2 * 8 * 128 * 2
    assert cost.num_kv_blocks(16) == int((H100.memory_bytes * 0.9 - cost.weight_bytes) // (16 * 16384))
    assert cost.transfer_s(1000) == pytest.approx(H100.link.latency_us / 1e6 + 16384e3 / H100.link.bandwidth)
    small = dataclasses.replace(H100, memory_bytes=10**9)
    assert RooflineStepCost(LAYOUT, CONFIG, small).num_kv_blocks(16) == 0


def test_a_kv_cache_of_8_bits() -> None:
    """A row has a byte per element, and a scale of 4 bytes; attention of decodes reads so much less."""
    plain, codes = (RooflineStepCost(LAYOUT, CONFIG, bare(H100), kv_form=form) for form in (None, KV_FORMS["int8"]))
    assert codes.kv_bytes_per_token == 4 * 2 * 8 * (128 + 4)
    assert codes.num_kv_blocks(16) / plain.num_kv_blocks(16) == pytest.approx(256 / 132, rel=1e-3)
    assert codes.transfer_s(10**6) / plain.transfer_s(10**6) == pytest.approx(132 / 256, rel=1e-3)
    short, long = StepWork((), 8, 800), StepWork((), 8, 800_000)
    read = [cost.step_s(long) - cost.step_s(short) for cost in (codes, plain)]
    assert read[0] / read[1] == pytest.approx(132 / 256, rel=1e-3)


def test_a_degree_that_does_not_divide_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="3"):
        RooflineStepCost(LAYOUT, CONFIG, H100, tensor_parallel_size=3)


def test_a_fused_all_reduce_sends_what_a_plain_one_sends() -> None:
    fused, plain = (
        RooflineStepCost(LAYOUT, CONFIG, bare(H100), tensor_parallel_size=2, is_fused=is_fused)
        for is_fused in (True, False)
    )
    for work in WORKS:
        assert fused.link_s(work) == pytest.approx(plain.link_s(work))


def test_stages_have_shares_and_room_of_their_layers() -> None:
    """The head is as large as many layers: the last stage has fewer of them, and the first one less room for KV."""
    config = LAYOUT.read_config(HFConfig({**LAYOUT.tiny, "num_hidden_layers": 8, "vocab_size": 4096}))
    hardware = dataclasses.replace(H100, memory_bytes=4_000_000)
    cost = RooflineStepCost(LAYOUT, config, hardware)
    sizes = choose_sizes(LAYOUT, config, 2)
    assert sizes == (7, 1)
    assert sum(cost.stage_shares(2)) == pytest.approx(1.0) and cost.stage_shares(1) == (1.0,)
    held = stage_weight_bytes(cost.graph, sizes)
    per_layer = cost.kv_bytes_per_token * 16 // 8
    room = [int((0.9 * 4_000_000 - one) // (count * per_layer)) for one, count in zip(held, sizes, strict=True)]
    assert cost.num_kv_blocks(16, pipeline_depth=2) == min(room) == room[0] < room[1]
    assert sum(held) >= cost.weight_bytes
