"""Tests of the merge, schedule, prefetch and memory passes, on random graphs and on small constructed ones."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes.comm import CommFusion
from sageLLM.generated.passes.schedule import ComputeCommOverlap, KvPrefetch
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.order import lane
from sageLLM.runtime.core.ir.reachability import Reachability
from sageLLM.runtime.core.ir.text import to_text
from sageLLM.runtime.core.ir.verify import verify

from .conftest import ancestors, block_graphs, made

MB = 1 << 20


def ref(name: str, num_bytes: int = 1024) -> TensorRef:
    return TensorRef(name, (num_bytes // 4,), "f32")


def node(
    name: str, kind: OpType, reads: str, *, us: float = 1.0, size: int = 1024, layer: int | None = None
) -> ExecutionNode:
    """A node `name` that makes the value `name` from the values that `reads` lists."""
    inputs = [ref(value, size) for value in reads.split()]
    return ExecutionNode(name, kind, inputs, [ref(name, size)], estimated_time_us=us, layer_id=layer)


def graph_of(*nodes: ExecutionNode, returns: str = "") -> ExecutionGraph:
    graph = ExecutionGraph("g")
    for one in nodes:
        for value in one.inputs:
            if graph.producer(value) is None:
                graph.inputs[value.name] = value
        graph.add_node(one)
    graph.outputs = [next(r for n in nodes for r in n.outputs if r.name == name) for name in returns.split()]
    verify(graph)
    return graph


# merge


@given(block_graphs())
def test_merging_keeps_values_and_reachability(graph: ExecutionGraph) -> None:
    text, before = to_text(graph), ancestors(graph)
    merged = CommFusion().apply(graph)
    verify(merged)
    assert to_text(graph) == text, "the argument was changed"
    assert made(merged) == made(graph)
    after = ancestors(merged)
    assert all(before[name] <= after[name] for name in before)
    parts = {origin for one in merged.nodes.values() for origin in one.origins}
    assert merged.comm_nodes == {n.node_id for n in merged.nodes.values() if n.op_type.is_comm}
    assert {n for n in graph.nodes if n not in merged.nodes} <= parts


@given(block_graphs())
def test_merged_parts_did_not_wait_for_one_another(graph: ExecutionGraph) -> None:
    before = ancestors(graph)
    for one in CommFusion().apply(graph).nodes.values():
        names = [value.name for value in one.outputs]
        assert not any(a in before[b] for a, b in permutations(names, 2))
        assert len({graph.nodes[origin].attrs["group"] for origin in one.origins}) <= 1


@given(block_graphs())
def test_no_merge_takes_longer_than_its_parts(graph: ExecutionGraph) -> None:
    for one in CommFusion(HARDWARE["h100"]).apply(graph).nodes.values():
        times = [graph.nodes[origin].estimated_time_us for origin in one.origins]
        if times:
            assert max(times) <= one.estimated_time_us <= sum(times)


def test_two_independent_all_reduces_become_one() -> None:
    kind = OpType.COMM_ALLREDUCE
    graph = graph_of(
        node("a", kind, "x", us=12.0), node("b", kind, "y", us=14.0), node("f", OpType.FFN, "a b"), returns="f"
    )
    merged = CommFusion(HARDWARE["h100"]).apply(graph)
    assert list(merged.nodes) == ["a", "f"]
    one = merged.nodes["a"]
    assert ([v.name for v in one.inputs], [v.name for v in one.outputs], one.origins) == (
        ["x", "y"],
        ["a", "b"],
        ("a", "b"),
    )
    assert merged.nodes["f"].dependencies == {"a"}
    assert one.estimated_time_us < 26.0


def test_two_merges_do_not_close_a_circle() -> None:
    """a -> d and c -> b: merging a with b and c with d would let each wait for the other."""
    kind = OpType.COMM_ALLREDUCE
    first = [node("a", kind, "x"), node("c", kind, "y", size=2048)]
    second = [node("fa", OpType.FFN, "a"), node("fc", OpType.FFN, "c", size=2048)]
    second[0].outputs, second[1].outputs = [ref("fa", 2048)], [ref("fc")]
    third = [node("d", kind, "fa", size=2048), node("b", kind, "fc")]
    merged = CommFusion().apply(graph_of(*first, *second, *third))
    verify(merged)


def test_incompatible_nodes_are_not_merged() -> None:
    kind = OpType.COMM_ALLREDUCE
    nodes = [node(name, kind, f"x{name}") for name in "abcd"]
    nodes[1].attrs["group"] = "dp"
    nodes[2].device_id = 1
    nodes[3].inputs, nodes[3].outputs = [TensorRef("xd", (8,), "bf16")], [TensorRef("d", (8,), "bf16")]
    assert len(CommFusion().apply(graph_of(*nodes)).nodes) == 4
    large = [node(name, kind, f"x{name}", size=20 * MB) for name in "ab"]
    assert len(CommFusion().apply(graph_of(*large)).nodes) == 2, "the limit is 32 MB"


def test_reachability_follows_merges() -> None:
    graph = graph_of(*(node(a, OpType.FFN, b) for a, b in ("ax", "ba", "cy", "dc")))
    reach = Reachability(graph.topological_sort())
    assert reach.are_independent("b", "d")
    reach.tie(["b", "c"])
    assert reach.waits_for("d", "a")
    assert not reach.waits_for("a", "d")


# schedule


@given(block_graphs())
def test_overlap_is_never_slower_and_never_impossibly_fast(graph: ExecutionGraph) -> None:
    before = graph.estimate_total_time()
    scheduled = ComputeCommOverlap().apply(graph)
    verify(scheduled)
    after = scheduled.estimate_total_time()
    path = sum(one.estimated_time_us for one in scheduled.get_critical_path())
    work: dict[tuple[int, int], float] = {}
    for one in scheduled.nodes.values():
        work[lane(one)] = work.get(lane(one), 0.0) + one.estimated_time_us
    assert max([path, *work.values()]) <= after + 1e-9
    assert after <= before + 1e-9
    assert made(scheduled) == made(graph)
    assert all(graph.nodes[i].dependencies <= one.dependencies for i, one in scheduled.nodes.items())
    assert list(scheduled.nodes) == [one.node_id for one in scheduled.topological_sort()]


@given(block_graphs())
def test_scheduling_twice_changes_nothing_more(graph: ExecutionGraph) -> None:
    once = ComputeCommOverlap().apply(graph)
    twice = ComputeCommOverlap().apply(once)
    assert twice.estimate_total_time() <= once.estimate_total_time()
    assert {i: n.stream_id for i, n in once.nodes.items()} == {i: n.stream_id for i, n in twice.nodes.items()}


def test_a_transfer_runs_in_parallel_to_computation() -> None:
    graph = graph_of(
        node("f", OpType.FFN, "x", us=10.0),
        node("r", OpType.COMM_ALLREDUCE, "f", us=8.0),
        node("g", OpType.FFN, "y", us=8.0),
        node("h", OpType.FFN, "r g", us=1.0),
    )
    assert graph.estimate_total_time() == 27.0
    one = ComputeCommOverlap()
    scheduled = one.apply(graph)
    assert scheduled.estimate_total_time() == 19.0
    assert {n.node_id: n.stream_id for n in scheduled.nodes.values()} == {"f": 0, "r": 1, "g": 0, "h": 0}
    assert one.report.facts == {"moved": 1, "waits": 2, "us_before": 27.0, "us_after": 19.0}


# prefetch


def decode_layers(num_layers: int) -> ExecutionGraph:
    nodes: list[ExecutionNode] = []
    for i in range(num_layers):
        before = f"f{i - 1}" if i else "x"
        nodes.append(node(f"kv{i}", OpType.KV_LOAD, f"cache{i}", us=4.0, layer=i))
        nodes.append(node(f"a{i}", OpType.DECODE_ATTN, f"{before} kv{i}", us=5.0, layer=i))
        nodes.append(node(f"f{i}", OpType.FFN, f"a{i}", us=5.0, layer=i))
    return graph_of(*nodes, returns=f"f{num_layers - 1}")


def test_the_next_layer_loads_while_this_one_computes() -> None:
    graph = decode_layers(4)
    one = KvPrefetch()
    ahead = one.apply(graph)
    verify(ahead)
    assert (graph.estimate_total_time(), ahead.estimate_total_time()) == (56.0, 44.0)
    assert {n.stream_id for n in ahead.nodes.values() if n.op_type is OpType.KV_LOAD} == {1}
    assert one.report.facts["prefetched"] == 3
    assert ahead.nodes["kv1"].dependencies == set()
    assert ahead.nodes["kv2"].dependencies == {"f0"}, "layer 2 may load once layer 1 begins"
    assert ahead.nodes["kv3"].dependencies == {"f1"}


@pytest.mark.parametrize(
    ("budget", "fences"), [(10**9, [set(), set(), {"f0"}, {"f1"}]), (1, [set(), {"a0"}, {"a1"}, {"a2"}])]
)
def test_no_more_than_the_budget_is_loaded_and_unused(budget: int, fences: list[set[str]]) -> None:
    """With room for one load each waits for the users of the one before it."""
    after = KvPrefetch(budget_bytes=budget).apply(decode_layers(4))
    assert [after.nodes[f"kv{i}"].dependencies - ({f"f{i - 2}"} if budget == 1 else set()) for i in range(4)] == fences


def test_a_load_follows_the_earlier_store() -> None:
    """The long node runs in parallel, so that the scheduling pass can save time."""
    store = ExecutionNode("s", OpType.KV_STORE, [ref("new"), ref("cache")], [], estimated_time_us=9.0, layer_id=0)
    load = node("kv", OpType.KV_LOAD, "cache", us=2.0, layer=1)
    rest = [node("a", OpType.DECODE_ATTN, "kv", layer=1), node("f", OpType.FFN, "x", us=9.0)]
    for one in (KvPrefetch(), ComputeCommOverlap()):
        assert one.apply(graph_of(store, load, *rest)).nodes["kv"].dependencies == {"s"}
        assert one.apply(graph_of(load, store, *rest)).nodes["s"].dependencies == {"kv"}


@given(st.integers(1, 8), st.integers(0, 9), st.integers(0, 9))
def test_prefetch_is_never_slower_and_deletes_no_edge(num_layers: int, load_us: int, compute_us: int) -> None:
    graph = decode_layers(num_layers)
    for one in graph.nodes.values():
        one.estimated_time_us = float(load_us if one.op_type is OpType.KV_LOAD else compute_us)
    result = KvPrefetch().apply(graph)
    assert result.estimate_total_time() <= graph.estimate_total_time()
    assert all(graph.nodes[i].dependencies <= one.dependencies for i, one in result.nodes.items())
