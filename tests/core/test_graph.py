"""Tests of the graph: order, cycles, times, subgraphs, binding and replacement."""

import itertools
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.runtime.core.errors import CycleError, IRError
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.text import to_text

(T,) = dims("T")


@pytest.fixture
def node(lib: SimpleNamespace) -> Any:
    """node("a", "x y", "z", time=3.0, type="FFN") reads x and y and writes z."""

    def make(
        node_id: str, reads: str = "", writes: str = "", *, type: str = "FFN", time: float = 0.0, **more: Any
    ) -> Any:
        inputs, outputs = ([TensorRef(name, (T, 8), "f32") for name in names.split()] for names in (reads, writes))
        return ExecutionNode(node_id, lib.OpType[type], inputs, outputs, estimated_time_us=time, **more)

    return make


def graph_of(*nodes: ExecutionNode, edges: str = "", **fields: Any) -> ExecutionGraph:
    graph = ExecutionGraph("g", **fields)
    for node in nodes:
        graph.add_node(node)
    for edge in edges.split():
        graph.add_edge(*edge.split(">"))
    return graph


def ids(nodes: list[ExecutionNode]) -> str:
    return " ".join(node.node_id for node in nodes)


def test_the_seed_signature() -> None:
    graph = ExecutionGraph("g")
    assert (graph.nodes, graph.prefill_nodes, graph.decode_nodes, graph.comm_nodes) == ({}, set(), set(), set())
    assert (graph.num_layers, graph.model_config) == (0, None)


def test_dependencies_follow_from_names(node: Any) -> None:
    graph = graph_of(node("a", "in", "x"), node("b", "x", "y"), node("c", "x y", "z", dependencies={"a"}))
    assert [n.dependencies for n in graph.nodes.values()] == [set(), {"a"}, {"a", "b"}]
    assert graph.producer("x") is graph.nodes["a"]
    assert graph.producer("in") is None
    assert ids(graph.users(TensorRef("x", (1,), "f32"))) == "b c"
    assert graph.users("z") == []


def test_a_node_id_is_taken_once(node: Any) -> None:
    with pytest.raises(IRError, match="graph 'g' already has a node 'a'"):
        graph_of(node("a"), node("a"))


@pytest.mark.parametrize("edge", ["a>z", "z>a"])
def test_an_edge_needs_both_ends(node: Any, edge: str) -> None:
    start, end = edge.split(">")
    with pytest.raises(IRError, match=f"edge '{start}' -> '{end}': unknown node 'z' in graph 'g'"):
        graph_of(node("a"), edges=edge)


def test_sorting_keeps_the_order_of_insertion(node: Any) -> None:
    names = ["e", "d", "c", "b", "a"]
    assert ids(graph_of(*map(node, names)).topological_sort()) == "e d c b a"
    assert ids(graph_of(*map(node, names), edges="a>d").topological_sort()) == "e c b a d"


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=200)
def test_sorting_respects_every_dependency_and_is_stable(lib: SimpleNamespace, seed: int, size: int) -> None:
    rng = random.Random(seed)
    hidden = list(range(size))
    rng.shuffle(hidden)
    graph = graph_of(*(ExecutionNode(str(i), lib.OpType.FFN, [], []) for i in range(size)))
    for a, b in itertools.combinations(range(size), 2):
        if rng.random() < 0.3:
            graph.add_edge(str(hidden[a]), str(hidden[b]))
    order = [n.node_id for n in graph.topological_sort()]
    done: list[str] = []
    while len(done) < size:  # the definition: always the first inserted of those that can run
        ready = (n for n in graph.nodes.values() if n.node_id not in done and n.dependencies <= set(done))
        done.append(next(ready).node_id)
    assert order == done


@pytest.mark.parametrize(
    ("edges", "cycle"),
    [
        ("a>b b>c c>a", "a -> b -> c -> a"),
        ("c>b b>c a>b", "b -> c -> b"),
        ("a>a", "a -> a"),
        ("a>b b>c c>d d>b", "b -> c -> d -> b"),
    ],
)
def test_a_cycle_names_its_nodes_in_order(node: Any, edges: str, cycle: str) -> None:
    graph = graph_of(*map(node, "abcd"), edges=edges)
    with pytest.raises(CycleError) as caught:
        graph.topological_sort()
    assert str(caught.value) == f"dependency cycle: {cycle}"
    assert caught.value.node_ids == tuple(cycle.split(" -> ")[:-1])


def test_an_unknown_dependency_is_named(node: Any) -> None:
    graph = graph_of(node("a", dependencies={"ghost"}))
    with pytest.raises(IRError, match="a: unknown dependency 'ghost' in graph 'g'"):
        graph.topological_sort()


def diamond(node: Any, **streams: int) -> ExecutionGraph:
    """a then b and c, then d."""
    times = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 2.0}
    nodes = [node(n, time=t, stream_id=streams.get(n, 0)) for n, t in times.items()]
    return graph_of(*nodes, edges="a>b a>c b>d c>d")


def test_critical_path_is_the_longest_chain_in_time(node: Any) -> None:
    assert ids(diamond(node).get_critical_path()) == "a b d"
    assert ids(graph_of(*map(node, "abc"), edges="b>c").get_critical_path()) == "b c"
    assert ExecutionGraph("g").get_critical_path() == []


def test_total_time_overlaps_streams_and_devices(node: Any) -> None:
    assert diamond(node).estimate_total_time() == 11.0
    assert diamond(node, c=1).estimate_total_time() == 8.0
    graph = diamond(node)
    graph.nodes["c"].device_id = 1
    assert graph.estimate_total_time() == 8.0
    assert ExecutionGraph("g").estimate_total_time() == 0.0


def test_nodes_of_one_stream_wait_for_each_other_without_dependencies(node: Any) -> None:
    graph = graph_of(node("a", time=4.0), node("b", time=1.0, stream_id=1), node("c", time=2.0, stream_id=1))
    assert graph.estimate_total_time() == 4.0
    graph.add_edge("a", "b")
    assert graph.estimate_total_time() == 7.0


@given(st.integers(0, 10**6))
def test_total_time_is_between_the_critical_path_and_the_sum(lib: SimpleNamespace, seed: int) -> None:
    rng = random.Random(seed)
    graph = ExecutionGraph("g")
    for i in range(8):
        node = ExecutionNode(str(i), lib.OpType.FFN, [], [], device_id=rng.randrange(2), stream_id=rng.randrange(2))
        node.estimated_time_us = float(rng.randrange(9))
        graph.add_node(node)
        for before in rng.sample(range(i), k=min(i, rng.randrange(3))):
            graph.add_edge(str(before), str(i))
    path = sum(n.estimated_time_us for n in graph.get_critical_path())
    everything = sum(n.estimated_time_us for n in graph.nodes.values())
    assert path <= graph.estimate_total_time() <= everything


def test_subgraph_leaves_the_original_alone(node: Any) -> None:
    graph = graph_of(
        node("a", "in", "x"), node("b", "x w", "y", type="COMM_ALLREDUCE"), node("c", "y", "z"), stage="decode"
    )
    graph.inputs["in"] = TensorRef("in", (T, 8), "f32")
    graph.weights["w"] = TensorRef("w", (T, 8), "f32")
    graph.outputs = [TensorRef("z", (T, 8), "f32")]
    before = to_text(graph)
    part = graph.get_subgraph(["c", "b"])
    assert list(part.nodes) == ["b", "c"]
    assert part.nodes["b"].dependencies == set()
    assert part.nodes["c"].dependencies == {"b"}
    assert (part.decode_nodes, part.prefill_nodes, part.comm_nodes) == ({"b", "c"}, set(), {"b"})
    assert (list(part.inputs), list(part.weights), [r.name for r in part.outputs]) == (["x"], ["w"], ["z"])
    assert [r.name for r in graph.get_subgraph(["a"]).outputs] == ["x"]
    part.nodes["c"].dependencies.add("zzz")
    part.nodes["b"].inputs.clear()
    part.comm_nodes.clear()
    assert to_text(graph) == before


def test_subgraph_of_unknown_nodes(node: Any) -> None:
    with pytest.raises(IRError, match="graph 'g': unknown node 'x', 'y'"):
        graph_of(node("a")).get_subgraph(["a", "y", "x"])


def test_bind_returns_a_new_graph_with_sizes(lib: SimpleNamespace, node: Any) -> None:
    graph = graph_of(node("a", "in", "x", attrs={"n": 2 * T, "pair": (T, "T"), "k": 1.5}))
    graph.inputs["in"] = TensorRef("in", (T, 8), "f32")
    graph.outputs = graph.nodes["a"].outputs[:]
    bound = graph.bind(T=5, B=9)
    assert bound.nodes["a"].outputs == bound.outputs == [TensorRef("x", (5, 8), "f32")]
    assert bound.nodes["a"].attrs == {"n": 10, "pair": (5, "T"), "k": 1.5}
    assert bound.inputs["in"].num_bytes == 160
    assert graph.nodes["a"].outputs == [TensorRef("x", (T, 8), "f32")]
    assert graph.copy() == graph


@pytest.mark.parametrize(
    ("stage", "level", "type", "metadata", "phases"),
    [
        ("prefill", "block", "FFN", {}, "prefill"),
        ("decode", "block", "PREFILL_ATTN", {}, "decode"),
        ("hybrid", "block", "FFN", {}, "prefill decode"),
        ("hybrid", "block", "PREFILL_ATTN", {}, "prefill"),
        ("hybrid", "kernel", "DECODE_ATTN", {}, "decode"),
        ("hybrid", "block", "KV_STORE", {}, "prefill"),
        ("hybrid", "block", "KV_LOAD", {}, "decode"),
        ("hybrid", "kernel", "KV_STORE", {}, "prefill decode"),
        ("hybrid", "kernel", "PREFILL_ATTN", {"phase": "decode"}, "decode"),
        (None, "block", "DECODE_ATTN", {}, "decode"),
        (None, "block", "FFN", {}, ""),
        (None, "block", "FFN", {"phase": "prefill"}, "prefill"),
    ],
)
def test_membership(node: Any, stage: Any, level: Any, type: str, metadata: dict[str, str], phases: str) -> None:
    graph = graph_of(node("a", type=type, metadata=metadata), stage=stage, level=level)
    assert (graph.prefill_nodes == {"a"}, graph.decode_nodes == {"a"}) == ("prefill" in phases, "decode" in phases)


def test_comm_nodes(node: Any) -> None:
    graph = graph_of(node("a", type="COMM_SEND"), node("b"))
    assert graph.comm_nodes == {"a"}


def chain(node: Any) -> ExecutionGraph:
    """a -> b -> c -> d by values; `after` waits for c, and b waits for `first`."""
    graph = graph_of(
        node("first"), node("a", "in", "x"), node("b", "x", "y", dependencies={"first"}), node("c", "y", "z"),
        node("d", "z y2", "out"), node("after", dependencies={"c"}),
    )  # fmt: skip
    graph.outputs = [TensorRef("z", (T, 8), "f32")]
    return graph


@pytest.mark.parametrize("new_id", ["b", "c", "bc"])
def test_replace_inserts_new_nodes_at_the_position_of_the_old(node: Any, new_id: str) -> None:
    graph = chain(node)
    graph.replace(["b", "c"], [node(new_id, "x", "z")])
    graph.nodes["d"].inputs.pop()
    assert ids(graph.topological_sort()) == f"first a {new_id} d after"
    assert graph.nodes[new_id].dependencies == {"a", "first"}
    assert graph.nodes["d"].dependencies == {new_id}
    assert graph.nodes["after"].dependencies == {new_id}
    assert graph.producer("y") is None
    assert ids(graph.users("x")) == new_id


def test_replace_renames_values_for_their_users(node: Any) -> None:
    graph = chain(node)
    graph.replace([graph.nodes["c"]], [node("e", "y", "u"), node("f", "u", "v")], {"z": "v"})
    assert [r.name for r in graph.nodes["d"].inputs] == ["v", "y2"]
    assert [r.name for r in graph.outputs] == ["v"]
    assert graph.nodes["d"].dependencies == {"f"}
    assert graph.nodes["after"].dependencies == {"e", "f"}
    assert list(graph.nodes) == ["first", "a", "b", "e", "f", "d", "after"]
    assert ids(graph.users("v")) == "d"
    assert graph.users("z") == []


def test_replace_by_nothing_forwards_dependencies(node: Any) -> None:
    graph = chain(node)
    graph.replace(["b"], [], {"y": TensorRef("x", (T, 8), "f32")})
    assert "b" not in graph.nodes
    assert graph.nodes["c"].dependencies == {"a"}
    assert "b" not in graph.prefill_nodes


def test_successors_of_a_removed_node_wait_for_its_dependencies(node: Any) -> None:
    graph = graph_of(*map(node, "abc"), edges="a>b b>c")
    graph.replace(["b"], [])
    assert graph.nodes["c"].dependencies == {"a"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (["b", "c"], ["bc|x|q"], "replacing b, c would lose 'z', which d reads"),
        (["d"], ["a|z|out"], "graph 'g' already has a node 'a'"),
        (["b"], ["q|x|y", "q|x|y"], "graph 'g' already has a node 'q'"),
        (["nope"], [], "graph 'g': unknown node 'nope'"),
    ],
)
def test_a_replacement_that_cannot_be_changes_nothing(node: Any, old: list[str], new: list[str], message: str) -> None:
    graph = chain(node)
    before = to_text(graph)
    with pytest.raises(IRError, match=re.escape(message)):
        graph.replace(old, [node(*text.split("|")) for text in new])
    assert to_text(graph) == before


def test_a_value_that_the_graph_returns_is_not_lost(node: Any) -> None:
    graph = graph_of(node("a", "", "x"))
    graph.outputs = graph.nodes["a"].outputs[:]
    with pytest.raises(IRError, match="replacing a would lose 'x', which the graph's caller reads"):
        graph.replace(["a"], [])
