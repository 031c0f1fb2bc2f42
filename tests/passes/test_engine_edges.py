"""Tests of graphs that passes must not change: merges and edges that would be wrong."""

from __future__ import annotations

import pytest

from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes.comm import CommFusion
from sageLLM.generated.passes.schedule import KvPrefetch
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.reachability import Reachability
from sageLLM.runtime.core.ir.types import E
from sageLLM.runtime.core.ir.verify import verify


def node(name: str, kind: OpType, reads: str = "", *, layer: int | None = None) -> ExecutionNode:
    inputs = [TensorRef(value, (4,), "f32") for value in reads.split()]
    return ExecutionNode(name, kind, inputs, [TensorRef(name, (4,), "f32")], layer_id=layer)


def two_all_reduces() -> ExecutionGraph:
    graph = ExecutionGraph("g", inputs={"x": TensorRef("x", (4,), "f32")})
    for name in "ab":
        graph.add_node(node(name, OpType.COMM_ALLREDUCE, "x"))
    return graph


@pytest.mark.parametrize(("name", "values"), [("group", ("tp", "ep")), ("ranks", (2, 4)), ("group", ("tp", None))])
def test_all_reduces_among_other_devices_are_not_merged(name: str, values: tuple[object, object]) -> None:
    graph = two_all_reduces()
    for one, value in zip(graph.nodes.values(), values, strict=True):
        one.metadata |= {name: value} if value is not None else {}
    assert list(CommFusion().apply(graph).nodes) == ["a", "b"]


def test_all_reduces_of_one_group_are_merged() -> None:
    graph = two_all_reduces()
    for one in graph.nodes.values():
        one.metadata |= {"group": "tp", "ranks": 2}
    merged = CommFusion().apply(graph)
    assert {i: (n.origins, n.metadata["group"]) for i, n in merged.nodes.items()} == {"a": (("a", "b"), "tp")}


def test_op_nodes_are_not_merged() -> None:
    """One kernel call takes one tensor; a merged node of several would have nothing to run it."""

    class Reduce(OpNode):
        op = "reduce"
        kind = OpType.COMM_ALLREDUCE
        input_types = {"x": E[...,]}
        output_types = {"y": E[...,]}

    x = TensorRef("x", (4,), "f32")
    graph = ExecutionGraph("g", level="kernel", inputs={"x": x})
    for name in "ab":
        graph.add_node(Reduce(name, Reduce.kind, [x], [TensorRef(name, (4,), "f32")]))
    verify(graph)
    assert [type(n) for n in CommFusion().apply(graph).nodes.values()] == [Reduce, Reduce]


def test_bounds_of_two_loads_close_no_circle() -> None:
    """Each bound alone is possible: A waits for x and B for y. Both are not, as y needs A and x needs B."""
    graph = ExecutionGraph("g")
    for one in (
        node("A", OpType.KV_LOAD, layer=2),
        node("B", OpType.KV_LOAD, layer=5),
        node("y", OpType.FFN, "A", layer=3),
        node("x", OpType.FFN, "B", layer=0),
    ):
        graph.add_node(one)
    result = KvPrefetch().apply(graph)
    verify(result)
    assert (result.nodes["A"].dependencies, result.nodes["B"].dependencies) == ({"x"}, set())


def test_reachability_follows_edges() -> None:
    graph = ExecutionGraph("g")
    for one in (node("a", OpType.FFN), node("b", OpType.FFN, "a"), node("c", OpType.FFN), node("d", OpType.FFN, "c")):
        graph.add_node(one)
    reach = Reachability(graph.topological_sort())
    reach.add_edge("b", "c")
    assert reach.waits_for("d", "a")
    assert not reach.waits_for("a", "d")
