"""Tests of the optimizer: public names and defaults, order, and hand-written passes among generated ones."""

from __future__ import annotations

import pytest

from sageLLM.runtime.core.errors import VerifyError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.text import to_text
from sageLLM.runtime.core.passes.events import WAITS
from sageLLM.runtime.execution_graph.builder import (
    DecodeBatch,
    ExecutionGraphBuilder,
    ModelConfig,
    ParallelConfig,
    PrefillBatch,
)
from sageLLM.runtime.execution_graph.optimizer import (
    CommunicationFusionPass,
    ComputeCommOverlapPass,
    GraphOptimizer,
    KVPrefetchPass,
    MemoryOptimizationPass,
    OptimizationPass,
)

SEED_PASSES = [CommunicationFusionPass, ComputeCommOverlapPass, KVPrefetchPass, MemoryOptimizationPass]


class Rename(OptimizationPass):
    """A pass written by hand."""

    @property
    def name(self) -> str:
        return "rename"

    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        result = graph.copy()
        result.graph_id = "renamed"
        return result


class Break(Rename):
    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        result = graph.copy()
        next(iter(result.nodes.values())).dependencies.add("nowhere")
        return result


def graphs(tp: int) -> list[ExecutionGraph]:
    builder = ExecutionGraphBuilder(ModelConfig(4, 64, 8, 4, 128, 512), ParallelConfig(tensor_parallel_size=tp))
    prefill, decode = PrefillBatch(["a"], [24], 24), DecodeBatch(["b", "c"], [9, 17], 2)
    return [
        builder.build_prefill_graph(prefill),
        builder.build_decode_graph(decode),
        builder.build_hybrid_graph(prefill, decode),
    ]


def test_the_seed_order_is_the_default() -> None:
    names = ["comm_fusion", "compute_comm_overlap", "kv_prefetch", "memory_opt"]
    assert [type(one) for one in GraphOptimizer().passes] == SEED_PASSES
    assert [one.name for one in GraphOptimizer().passes] == names
    assert GraphOptimizer([]).passes == []


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_model_graphs_are_never_slower_and_stay_valid(tp: int, index: int) -> None:
    graph = graphs(tp)[index]
    text = to_text(graph)
    optimizer = GraphOptimizer(verify=True)
    result = optimizer.optimize(graph)
    assert to_text(graph) == text
    assert result.estimate_total_time() <= graph.estimate_total_time()
    assert (result.prefill_nodes, result.decode_nodes, result.comm_nodes) == (
        graph.prefill_nodes,
        graph.decode_nodes,
        graph.comm_nodes,
    )
    memory = optimizer.report[-1].facts
    assert float(memory["peak_bytes"]) <= 1.05 * float(memory["max_live_bytes"])
    assert float(memory["reuse_ratio"]) > 2.0


def test_generated_and_hand_written_passes_mix() -> None:
    graph = graphs(1)[0]
    optimizer = GraphOptimizer([Rename(), ComputeCommOverlapPass()])
    optimizer.add_pass(Rename())
    assert optimizer.optimize(graph).graph_id == "renamed"
    assert [report.name for report in optimizer.report] == ["rename", "compute_comm_overlap", "rename"]
    assert graph.graph_id == "prefill_24"


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    with pytest.raises(VerifyError) as caught:
        GraphOptimizer([Break()], verify=True).optimize(graphs(1)[0])
    (problem,) = caught.value.problems
    assert problem.startswith("after rename: ")
    assert problem.endswith("unknown dependency 'nowhere'")


class ForgetWaits(Rename):
    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        result = graph.copy()
        waiting = [node for node in result.nodes.values() if WAITS in node.metadata]
        del waiting[0].metadata[WAITS]
        return result


def test_a_pass_that_breaks_the_schedule_is_named() -> None:
    graph = graphs(2)[0]
    with pytest.raises(VerifyError) as caught:
        GraphOptimizer([ComputeCommOverlapPass(), ForgetWaits()], verify=True).optimize(graph)
    assert all(problem.startswith("after rename: ") for problem in caught.value.problems)
    assert caught.value.problems[0].endswith("is done: no event orders them")
