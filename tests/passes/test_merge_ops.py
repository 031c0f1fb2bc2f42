"""Tests of merging op nodes: bits, counts, cost from the link, and models with parallel attention and feed-forward."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.ops.comm import AllReduce
from sageLLM.generated.ops.elementwise import Add
from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes.comm import CommFusion
from sageLLM.runtime.core.cost import Hardware, Link, annotate, latency_us
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.passes.check import verify_schedule

from .conftest import ancestors
from .op_graphs import op_graphs, random_values, run, same_bits

SLOW_LINK = Hardware("test", {"f64": 1e12}, 1e12, 1 << 30, 1.0, Link(1e9, 50.0), Link(1e9, 50.0))


@given(op_graphs())
@settings(max_examples=40)
def test_merged_op_graphs_compute_the_same_bits(graph: ExecutionGraph) -> None:
    annotate(graph, SLOW_LINK)
    merged = CommFusion(SLOW_LINK).apply(graph)
    verify(merged)
    verify_schedule(merged)
    values = random_values(graph)
    assert same_bits(run(merged, values), run(graph, values))
    assert merged.estimate_total_time() <= graph.estimate_total_time()
    assert merged.comm_nodes == {n.node_id for n in merged.nodes.values() if n.op_type.is_comm}


@given(op_graphs())
@settings(max_examples=40)
def test_only_independent_all_reduces_of_one_group_are_joined(graph: ExecutionGraph) -> None:
    annotate(graph, SLOW_LINK)
    before = ancestors(graph)
    for node in CommFusion(SLOW_LINK).apply(graph).nodes.values():
        if node.op == "all_reduce" and node.origins:
            parts = [graph.nodes[origin] for origin in node.origins]
            names = [part.outputs[0].name for part in parts]
            assert not any(a in before[b] for a in names for b in names)
            assert len({part.attrs["group"] for part in parts}) == 1


def two_sums(rows: int = 4) -> ExecutionGraph:
    x = TensorRef("x", (rows, 8), "f64")
    graph = ExecutionGraph("g", level="kernel", inputs={"x": x})
    sums = [TensorRef(name, x.shape, "f64") for name in "ab"]
    for ref in sums:
        graph.add_node(AllReduce(ref.name, AllReduce.kind, [x], [ref], attrs={"group": "tp"}))
    graph.add_node(Add("y", Add.kind, sums, [TensorRef("y", x.shape, "f64")]))
    graph.outputs = graph.nodes["y"].outputs
    annotate(graph, SLOW_LINK, {"tp": 4})
    return graph


def test_a_pair_is_joined_and_taken_apart_by_views() -> None:
    graph = two_sums()
    one = CommFusion(SLOW_LINK, {"tp": 4})
    merged = one.apply(graph)
    assert [(n.op, n.node_id) for n in merged.nodes.values()] == [
        ("concat_rows", "a.joined"),
        ("all_reduce", "a.sum"),
        ("split_rows", "a"),
        ("add", "y"),
    ]
    assert one.report.facts["merged"] == 2
    assert merged.nodes["a.sum"].origins == ("a", "b")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_latency_of_the_link_is_saved_once(ranks: int) -> None:
    """A ring of n ranks has 2 (n - 1) steps; a merged transfer takes what one of the same size is estimated to take."""
    graph = two_sums()
    annotate(graph, SLOW_LINK, {"tp": ranks})
    a, b = (graph.nodes[name] for name in "ab")
    assert latency_us(a, SLOW_LINK, {"tp": ranks}) == 1.0 + 2 * (ranks - 1) * 50.0
    merged = CommFusion(SLOW_LINK, {"tp": ranks}).apply(graph)
    together = merged.nodes["a.sum"].estimated_time_us
    annotate(merged, SLOW_LINK, {"tp": ranks})
    assert together == pytest.approx(merged.nodes["a.sum"].estimated_time_us)
    assert together < a.estimated_time_us + b.estimated_time_us


def test_copies_that_cost_more_than_the_latency_are_not_made() -> None:
    cheap = Hardware("test", {"f64": 1e12}, 1e6, 1 << 30, 0.0, Link(1e9, 1.0), Link(1e9, 1.0))
    graph = two_sums(rows=4096)
    annotate(graph, cheap)
    assert CommFusion(cheap).apply(graph).nodes.keys() == graph.nodes.keys()
    assert CommFusion().apply(graph).nodes.keys() == graph.nodes.keys(), "without hardware nothing is known"


def test_a_late_part_does_not_hold_up_an_early_one() -> None:
    """a is ready at once and much waits for it; b comes late. Each alone on its stream is faster than both together."""
    ref = {name: TensorRef(name, (4,), "f32") for name in ("x", "late", "a", "b", "after", "y")}
    graph = ExecutionGraph("g", inputs={"x": ref["x"]})
    for name, kind, reads, us, stream in (
        ("late", OpType.FFN, ["x"], 100.0, 0),
        ("a", OpType.COMM_ALLREDUCE, ["x"], 10.0, 1),
        ("after", OpType.FFN, ["a"], 100.0, 2),
        ("b", OpType.COMM_ALLREDUCE, ["late"], 10.0, 1),
        ("y", OpType.FFN, ["after", "b"], 1.0, 0),
    ):
        inputs = [ref[value] for value in reads]
        graph.add_node(ExecutionNode(name, kind, inputs, [ref[name]], stream_id=stream, estimated_time_us=us))
    assert list(CommFusion(HARDWARE["h100"]).apply(graph).nodes) == list(graph.nodes)
    for node in graph.nodes.values():
        node.stream_id = 0
    assert "b" not in CommFusion(HARDWARE["h100"]).apply(graph).nodes
