"""Tests of streams and events: minimal waits, enforced dependencies, bounds of the estimated time, prefetch budget."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes.schedule import ComputeCommOverlap, KvPrefetch, NanoOverlap
from sageLLM.runtime.core.errors import VerifyError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import lane, time_spans
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.passes.check import verify_schedule
from sageLLM.runtime.core.passes.clocks import Clocks
from sageLLM.runtime.core.passes.events import WAITS, plan_events
from sageLLM.runtime.core.passes.sharing import Share, simulate

from .conftest import block_graphs
from .op_graphs import op_graphs, random_order, random_values, run, same_bits
from .test_engines import decode_layers, graph_of, node


def waits_of(graph: ExecutionGraph) -> list[list[str]]:
    return [list(node.metadata.get(WAITS, [])) for node in graph.topological_sort()]


def keeps(graph: ExecutionGraph, waits: list[list[str]]) -> bool:
    """Whether lanes in order, with these waits, keep every dependency of a graph."""
    order = graph.topological_sort()
    clocks = Clocks(order, waits)
    pairs = [(i, clocks.position[d]) for i, node in enumerate(order) for d in node.dependencies]
    return all(clocks.runs_after(later, earlier) for later, earlier in pairs)


@given(op_graphs(num_streams=3))
@settings(max_examples=50)
def test_waits_are_enough_and_none_is_too_much(graph: ExecutionGraph) -> None:
    count = plan_events(graph)
    waits = waits_of(graph)
    assert count == sum(map(len, waits))
    assert keeps(graph, waits)
    for i, names in enumerate(waits):
        for name in names:
            fewer = [[n for n in row if n != name] if k == i else row for k, row in enumerate(waits)]
            assert not keeps(graph, fewer), f"{name} need not be waited for"


@given(op_graphs(num_streams=3), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_scheduled_graphs_compute_the_same_bits_in_any_interleaving(graph: ExecutionGraph, random: Random) -> None:
    scheduled = ComputeCommOverlap().apply(graph)
    verify(scheduled)
    verify_schedule(scheduled)
    values = random_values(graph)
    for _ in range(3):
        played = scheduled.copy()
        played.nodes = {node.node_id: node for node in random_order(scheduled, random)}
        assert same_bits(run(played, values), run(graph, values))


def test_a_chain_over_two_streams_waits_at_every_change() -> None:
    graph = graph_of(*(node(name, OpType.FFN, reads) for name, reads in ("ax", "ba", "cb", "da", "ec")))
    for name in "bd":
        graph.nodes[name].stream_id = 1
    assert plan_events(graph) == 2
    assert waits_of(graph) == [[], ["a"], ["b"], [], []], "d waits for a through b, and e for c in its own lane"


def test_a_wait_implies_the_waits_of_what_it_waits_for() -> None:
    graph = graph_of(*(node(name, OpType.FFN, reads) for name, reads in (("a", "x"), ("b", "a"), ("c", "a b"))))
    for stream, name in enumerate("abc"):
        graph.nodes[name].stream_id = stream
    assert plan_events(graph) == 2
    assert waits_of(graph) == [[], ["a"], ["b"]], "c, on a third stream, waits for a through b"


# bounds


@given(block_graphs(), st.sampled_from([ComputeCommOverlap, NanoOverlap]))
@settings(max_examples=50)
def test_the_makespan_keeps_its_bounds(graph: ExecutionGraph, kind: type[ComputeCommOverlap | NanoOverlap]) -> None:
    scheduled = kind().apply(graph)
    path = sum(one.estimated_time_us for one in graph.get_critical_path())
    work: dict[tuple[int, int], float] = {}
    for one in graph.nodes.values():
        key = lane(scheduled.nodes[one.node_id])
        work[key] = work.get(key, 0.0) + one.estimated_time_us
    after = scheduled.estimate_total_time()
    assert max([path, *work.values()]) <= after + 1e-6
    assert after <= graph.estimate_total_time() + 1e-6


@given(block_graphs())
@settings(max_examples=50)
def test_without_shares_a_simulation_is_the_estimate(graph: ExecutionGraph) -> None:
    graph = ComputeCommOverlap().apply(graph)
    spans = time_spans(graph.topological_sort())
    assert max(span.end_us for span in spans.values()) == graph.estimate_total_time()


def test_concurrent_nodes_run_slower() -> None:
    """8 us of transfer at half speed take 16; meanwhile 10 us of computation at 0.8 are done after 12.5."""
    graph = graph_of(node("f", OpType.FFN, "x", us=10.0), node("r", OpType.COMM_ALLREDUCE, "y", us=8.0))
    graph.nodes["r"].stream_id = 1
    spans = simulate(graph, {1: Share(0.2, 0.5)})
    assert spans["f"].end_us == pytest.approx(12.5)
    assert spans["r"].end_us == pytest.approx(12.5 + (8.0 - 6.25)), "alone again, it goes at full speed"


def test_shared_streams_stretch_the_nodes_that_run_together() -> None:
    graph = graph_of(node("f", OpType.FFN, "x", us=10.0), node("r", OpType.COMM_ALLREDUCE, "y", us=8.0))
    scheduled = NanoOverlap().apply(graph)
    assert scheduled.estimate_total_time() == pytest.approx(14.25)
    assert scheduled.nodes["r"].estimated_time_us == pytest.approx(14.25), "its time while f runs"


# prefetch


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_no_more_is_loaded_than_the_budget(layers: int, loads: int, ahead: int, random: Random) -> None:
    """In any interleaving, what is loaded and not yet read by its layer fits the budget."""
    graph = decode_layers(layers)
    budget = loads * 1024
    one = KvPrefetch(budget)
    one.__class__ = type("Ahead", (KvPrefetch,), {"prefetch_layers": ahead})
    result = one.apply(graph)
    verify(result)
    verify_schedule(result)
    assert all(graph.nodes[i].dependencies <= n.dependencies for i, n in result.nodes.items())
    held = 0
    for one_node in random_order(result, random):
        held += 1024 * (one_node.op_type is OpType.KV_LOAD)
        assert held <= budget
        held -= 1024 * (one_node.op_type is OpType.DECODE_ATTN)


def test_a_load_on_the_device_is_left_alone() -> None:
    graph = decode_layers(3)
    for one in graph.nodes.values():
        if one.op_type is OpType.KV_LOAD:
            one.metadata["tier"] = "device"
    result = KvPrefetch().apply(graph)
    assert {n.stream_id for n in result.nodes.values()} == {0}


# what the checks find


def two_streams() -> ExecutionGraph:
    graph = graph_of(*(node(name, OpType.FFN, reads) for name, reads in ("ax", "ba", "cb")), returns="c")
    graph.nodes["b"].stream_id = 1
    plan_events(graph)
    verify_schedule(graph)
    return graph


def problem_of(graph: ExecutionGraph) -> str:
    with pytest.raises(VerifyError) as caught:
        verify_schedule(graph)
    return str(caught.value)


def test_a_lost_wait_is_found() -> None:
    graph = two_streams()
    del graph.nodes["c"].metadata[WAITS]
    assert "c: may start before b is done: no event orders them" in problem_of(graph)


def test_a_race_on_a_cache_is_found() -> None:
    store = ExecutionNode("s", OpType.KV_STORE, node("x", OpType.FFN, "new cache").inputs, [], stream_id=1)
    graph = graph_of(store, node("kv", OpType.KV_LOAD, "cache"))
    assert "kv: uses 'cache' at the same time as s, and one of them writes it" in problem_of(graph)
    graph.add_edge("s", "kv")
    verify_schedule(graph)


def test_collectives_without_an_order_are_found() -> None:
    graph = graph_of(*(node(name, OpType.COMM_ALLREDUCE, "x") for name in "ab"))
    graph.nodes["b"].stream_id = 1
    assert "b: not ordered with a, a collective of the same group" in problem_of(graph)
    graph.nodes["b"].attrs["group"] = "ep"
    verify_schedule(graph)


def test_transfers_out_of_order_are_found() -> None:
    graph = graph_of(
        node("s1", OpType.COMM_SEND, "x"),
        node("s2", OpType.COMM_SEND, "y"),
        node("r2", OpType.COMM_RECV, "s2"),
        node("r1", OpType.COMM_RECV, "s1"),
    )
    for one in graph.nodes.values():
        one.device_id = int(one.op_type is OpType.COMM_RECV)
        one.attrs |= {"peer": 1 - one.device_id, "group": "pp"}
    assert "device 0 sends to 1 ['s1', 's2'], which receives ['s2', 's1']" in problem_of(graph)


def test_overlapping_offsets_are_found() -> None:
    graph = two_streams()
    for one in graph.nodes.values():
        one.metadata["offsets"] = [0]
    assert "a and b overlap while both are live" in problem_of(graph)
