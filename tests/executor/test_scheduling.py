"""Streams of an engine's kernel graphs: collectives overlap with computation, in one order on all ranks."""

import pytest
import torch

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.passes.schedule import OverlapTransfers
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.order import time_spans
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.passes.check import verify_schedule
from sageLLM.runtime.execution_graph.stages import PipelineStage
from sageLLM.runtime.executor import scheduling
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.scheduling import choose_schedule
from sageLLM.runtime.registry.plugins import load_registry

REGISTRY = load_registry()
CPU = torch.device("cpu")
PARALLEL_BLOCKS = ("cohere", "falcon", "gptj", "phi")  # attention and feed-forward read the same value
CHAINS = ("llama", "qwen3_moe", "gemma3")


def compiler(name: str, *disabled: str) -> ModelCompiler:
    """The compiler of one of two ranks."""
    layout = MODELS[name]
    config = layout.shard_config(layout.read_config(HFConfig(layout.tiny, name)), 2)
    schedule = choose_schedule(CPU, {"tp": 2}, overlap_transfers=True)
    return ModelCompiler(layout, config, REGISTRY, dtype="f32", schedule=schedule, disable=disabled)


def overlapped(graph: ExecutionGraph) -> list[str]:
    """The collectives that are planned to run while a node of another stream does."""
    order = graph.topological_sort()
    spans = time_spans(order)
    found = []
    for node in order:
        start, end = spans[node.node_id]
        others = [spans[one.node_id] for one in order if one.stream_id != node.stream_id]
        if node.op_type.is_comm and any(max(start, a) < min(end, b) for a, b in others):
            found.append(node.node_id)
    return found


@pytest.mark.parametrize("stage", ["prefill", "decode", "hybrid"])
@pytest.mark.parametrize("name", PARALLEL_BLOCKS)
def test_collectives_of_parallel_blocks_overlap(name: str, stage: str) -> None:
    made = compiler(name)
    graph = made.kernel_graph(stage)
    verify(graph)
    verify_schedule(graph)
    (report,) = [one for one in made.reports[stage] if one.name == "overlap_transfers"]
    assert report.facts["us_after"] < report.facts["us_before"]
    assert len(overlapped(graph)) >= graph.num_layers
    assert {node.stream_id for node in graph.nodes.values() if not node.op_type.is_comm} == {0}
    lone = [node_id for node_id in graph.comm_nodes if node_id not in overlapped(graph)]
    assert {graph.nodes[node_id].stream_id for node_id in lone} <= {0}, "an event would gain nothing"
    assert all(node.stream_id == 0 for node in compiler(name, "overlap_transfers").kernel_graph(stage).nodes.values())


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_stays_in_one_stream_and_micro_batches_overlap(name: str) -> None:
    made = compiler(name)
    assert {node.stream_id for node in made.kernel_graph("decode").nodes.values()} == {0}
    graph = made.kernel_graph("decode", 2)
    verify(graph)
    verify_schedule(graph)
    assert len(overlapped(graph)) >= graph.num_layers


def test_overlap_requires_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling.torch, "get_num_threads", lambda: 1)
    for num_cores, overlaps in ((2, False), (3, False), (4, True)):
        monkeypatch.setattr(scheduling.os, "sched_getaffinity", lambda _, count=num_cores: set(range(count)))
        assert (choose_schedule(CPU, {"tp": 2}) is not None) == overlaps
        assert (choose_schedule(CPU, {"tp": 1}, num_processes=2) is not None) == overlaps, "two pipeline stages"
    assert choose_schedule(CPU, {"tp": 2}, overlap_transfers=False) is None
    assert choose_schedule(torch.device("cuda"), {"tp": 2}) is None


def test_a_graph_without_transfers_is_not_changed() -> None:
    layout = MODELS["llama"]
    graph = ModelCompiler(layout, layout.read_config(HFConfig(layout.tiny)), REGISTRY, dtype="f32").kernel_graph(
        "decode"
    )
    assert scheduling.schedule_streams(graph, [OverlapTransfers()], HARDWARE["cpu"], {}) == []


def test_the_order_of_a_pipeline_stage_stays_micro_batch_by_micro_batch() -> None:
    layout = MODELS["llama"]
    config = layout.read_config(HFConfig(layout.tiny))
    schedule = choose_schedule(CPU, {"tp": 1}, overlap_transfers=True)
    for index in range(2):
        stage = PipelineStage(index, (1, 1))
        made = ModelCompiler(layout, config, REGISTRY, dtype="f32", schedule=schedule, pipeline_stage=stage)
        nodes = list(made.kernel_graph("prefill", 2).nodes)
        transfers = [name for name in nodes if ".on1.p" in name or ".to1.p" in name]
        second = min(i for i, name in enumerate(nodes) if name.endswith(".n.p1"))
        last_of_first = max(i for i, name in enumerate(nodes) if name.endswith(".attention.o.p0"))
        assert last_of_first < second, "the first micro-batch must be complete before the second one begins"
        assert nodes.index(transfers[-1]) > last_of_first
