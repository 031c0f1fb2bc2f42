"""Tests of memory plans: random graphs run in their arena, the graphs of all models, and optimal plans."""

from __future__ import annotations

from itertools import permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.generated.ops.elementwise import Add
from sageLLM.generated.ops.norm import FusedAddRmsNorm
from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes.memory import MemoryOpt
from sageLLM.generated.passes.schedule import ComputeCommOverlap
from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.text import to_text
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.passes.check import verify_schedule
from sageLLM.runtime.core.passes.events import plan_events
from sageLLM.runtime.core.passes.lifetimes import Buffer, Lifetimes
from sageLLM.runtime.core.passes.memory import MemoryPlan, assign_offsets, find_interference, plan_buffers, plan_memory
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.inspect.numerics import SIZES as STEP
from sageLLM.runtime.inspect.numerics import inputs_of

from .conftest import block_graphs, made
from .op_graphs import Arena, op_graphs, random_order, random_values, run, same_bits
from .test_engines import graph_of, node
from .test_expect import CASES, REGISTRY, compiler_of

SIZES = [{**STEP, "T": rows, "Td": rows // 3, "Tp": rows - rows // 3, "B": 3, "S": 3} for rows in (3, 37, 512)]
RUN = ["bert", "deepseek_v2", "gemma2", "gpt2", "gpt_oss", "llama", "phi", "qwen2_moe", "qwen3"]


@pytest.mark.parametrize(("model", "stage"), CASES)
def test_plans_of_models_reach_the_lower_bound(model: str, stage: Stage) -> None:
    layout = REGISTRY.models[model]
    config = layout.read_config(HFConfig(layout.tiny, f"{model}: tests.tiny"))
    for dtype in ("bf16", "f32"):
        lifetimes = Lifetimes(ModelCompiler(layout, config, REGISTRY, dtype=dtype).kernel_graph(stage))
        for sizes in SIZES:
            plan = plan_memory(lifetimes, sizes)
            plan.check_integrity()
            assert plan.peak_bytes <= 1.02 * plan.max_live_bytes


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("model", [name for name in RUN if name in REGISTRY.models])
def test_a_model_runs_in_its_arena(model: str, stage: Stage) -> None:
    layout = REGISTRY.models[model]
    if stage not in layout.phases:
        pytest.skip("encoders are without a decode step")
    config = layout.read_config(HFConfig(layout.tiny, f"{model}: tests.tiny"))
    graph = ModelCompiler(layout, config, REGISTRY, dtype="f32").kernel_graph(stage)
    values = inputs_of(graph)
    expected = run(graph, {name: value.clone() for name, value in values.items()}, REGISTRY.kernels)
    arena = Arena(graph, plan_memory(graph, STEP), values, STEP)
    assert same_bits(arena.run(graph.topological_sort(), REGISTRY.kernels), expected)


@given(op_graphs(num_streams=3), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_no_interleaving_of_streams_destroys_a_value(graph: ExecutionGraph, random: Random) -> None:
    """Lanes stop at the noted events alone; every value is read from its place, and is what it should be."""
    plan_events(graph)
    values = random_values(graph)
    plan = plan_memory(graph, align=64)
    plan.check_integrity()
    for _ in range(3):
        assert same_bits(Arena(graph, plan, values).run(random_order(graph, random)), run(graph, values))


def test_a_plan_with_an_overlap_computes_wrong_results() -> None:
    """The oracle above can fail: with all buffers at one place it does."""
    x = TensorRef("x", (4, 8), "f64")
    graph = ExecutionGraph("g", level="kernel", inputs={"x": x})
    a, b, c = (TensorRef(name, (4, 8), "f64") for name in "abc")
    for inputs, output in (([x, x], a), ([a, x], b), ([a, b], c)):
        graph.add_node(Add(output.name, Add.kind, inputs, [output]))
    graph.outputs = [c]
    plan = plan_memory(graph)
    squeezed = MemoryPlan(plan.buffers, (0,) * len(plan.buffers))
    values = random_values(graph)
    assert same_bits(Arena(graph, plan, values).run(graph.topological_sort()), run(graph, values))
    assert not same_bits(Arena(graph, squeezed, values).run(graph.topological_sort()), run(graph, values))


@given(block_graphs(), st.booleans())
@settings(max_examples=50)
def test_live_values_never_overlap(graph: ExecutionGraph, use_streams: bool) -> None:
    graph = ComputeCommOverlap().apply(graph) if use_streams else graph
    one = MemoryOpt()
    result = one.apply(graph)
    plan = one.plan
    plan.check_integrity()
    assert plan.max_live_bytes <= plan.peak_bytes <= plan.total_bytes
    placed = {name for buffer in plan.buffers for name in buffer.names}
    assert placed == set(made(graph)), "every value has its place"
    offsets = {r.name: o for n in result.nodes.values() for r, o in zip(n.outputs, n.metadata["offsets"], strict=True)}
    assert all(offset % 256 == 0 and offset == plan.offset(name) for name, offset in offsets.items())
    verify(result)
    verify_schedule(result)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=6))
def test_plans_of_few_buffers_are_optimal(facts: list[tuple[int, int, int]]) -> None:
    """The optimum by trying all orders: first fit in the best order of placing is optimal."""
    buffers = [Buffer((f"v{i}",), 0, 256 * size, first, first + more) for i, (size, first, more) in enumerate(facts)]
    interference = find_interference(buffers)
    orders = permutations(range(len(buffers)))
    best = min(peak(buffers, assign_offsets(buffers, interference, order)) for order in orders)
    assert plan_buffers(buffers).peak_bytes == best


def peak(buffers: list[Buffer], offsets: list[int]) -> int:
    return max(offset + buffer.size for offset, buffer in zip(offsets, buffers, strict=True))


def test_a_plan_for_the_largest_step_serves_smaller_ones() -> None:
    """The places stay; each buffer only shrinks."""
    lifetimes = Lifetimes(compiler_of("llama").kernel_graph("decode"))
    large = plan_memory(lifetimes, {**STEP, "B": 64, "S": 64})
    small = lifetimes.buffers({**STEP, "B": 3, "S": 3}, 256)
    MemoryPlan(tuple(small), large.offsets).check_integrity()


def test_a_size_that_is_missing_is_named() -> None:
    graph = compiler_of("llama").kernel_graph("decode")
    with pytest.raises(IRError, match=r"is symbolic; bind "):
        plan_memory(graph, {"S": 3})


def test_a_chain_needs_two_buffers() -> None:
    names = "abcdef"
    graph = graph_of(*(node(n, OpType.FFN, names[i - 1] if i else "x") for i, n in enumerate(names)), returns="f")
    plan = plan_memory(graph)
    assert (plan.peak_bytes, plan.total_bytes, plan.reuse_ratio) == (2048, 6144, 3.0)


def test_a_value_on_another_stream_is_free_when_its_reader_is_known_to_be_done() -> None:
    """b runs on a separate stream; c does not wait for it and d does, so the memory of a is free for d and not c."""
    graph = graph_of(*(node(name, OpType.FFN, reads) for name, reads in ("ax", "ba", "cx", "db")), returns="c d")
    graph.nodes["b"].stream_id = 1
    buffers = {buffer.names[0]: buffer for buffer in Lifetimes(graph).buffers({}, 256)}
    assert buffers["a"].interferes_with(buffers["c"])
    assert not buffers["a"].interferes_with(buffers["d"])


def test_values_computed_in_place_share_memory() -> None:
    x, w = TensorRef("x", (4, 64), "f32"), TensorRef("w", (64,), "f32")
    a, y, h = (TensorRef(name, (4, 64), "f32") for name in "ayh")
    graph = ExecutionGraph("g", level="kernel", inputs={"x": x}, weights={"w": w}, outputs=[y, h])
    graph.add_node(Add("a", Add.kind, [x, x], [a]))
    graph.add_node(FusedAddRmsNorm("y", FusedAddRmsNorm.kind, [x, a, w], [y, h]))
    plan = plan_memory(graph)
    assert [buffer.names for buffer in plan.buffers] == [("a", "h"), ("y",)]
    assert plan.source == {"h": "a"}


def test_views_and_caches_take_no_memory_of_their_own() -> None:
    plan = plan_memory(compiler_of("llama").expanded_graph("decode"), STEP)
    shared = next(buffer.names for buffer in plan.buffers if "L0.attention.qkv" in buffer.names)
    assert {"L0.attention.q", "L0.attention.q_1"} <= set(shared)
    assert plan.offset("L0.attention.kc") is None, "it is in the cache"


def test_a_symbolic_graph_is_left_as_it_is() -> None:
    (T,) = dims("T")
    graph = ExecutionGraph("g")
    graph.add_node(ExecutionNode("a", OpType.FFN, [], [TensorRef("a", (T, 8), "f32")]))
    one = MemoryOpt()
    assert to_text(one.apply(graph)) == to_text(graph)
    assert one.report.facts == {"skipped": "the size of a: f32[T, 8] is symbolic"}


def test_overlapping_buffers_are_found() -> None:
    buffers = (Buffer(("a",), 0, 512, 0, 3), Buffer(("b",), 0, 256, 2, 4))
    with pytest.raises(ValueError, match=r"^a and b overlap while both are live$"):
        MemoryPlan(buffers, (0, 256)).check_integrity()
    MemoryPlan(buffers, (0, 512)).check_integrity()


def test_a_buffer_takes_the_smallest_gap_that_fits() -> None:
    """Three buffers of one byte leave gaps of four and of two bytes."""
    placed = [Buffer((name,), 0, 1, 0, 9) for name in ("a", "b", "c")]
    spacers = [Buffer(("wide",), 0, 4, 0, 4), Buffer(("narrow",), 0, 2, 0, 4)]
    late = Buffer(("late",), 0, 2, 5, 9)
    buffers = [placed[0], spacers[0], placed[1], spacers[1], placed[2], late]
    offsets = assign_offsets(buffers, find_interference(buffers), range(len(buffers)))
    assert offsets == [0, 1, 5, 6, 8, 6]
