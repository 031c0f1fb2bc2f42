"""Nodes that gain nothing from a separate stream: they return to that of the computation, which saves their events."""

from __future__ import annotations

from collections.abc import Mapping

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import Lane, Span, end_of, lane, time_spans
from sageLLM.runtime.core.passes.order import reorder

ROUNDING_US = 1e-6


def return_lone_nodes(graph: ExecutionGraph, stream: int = 0) -> int:
    """Moves nodes that overlap with no other lane to `stream`; returns their number.

    Nothing changes if the schedule would take longer. The order of the transfers of a lane, which must be the same on
    all ranks, is kept by edges.
    """
    order = graph.topological_sort()
    spans = time_spans(order)
    concurrent = _concurrent_nodes(order, spans)
    old = {node.node_id: (node.stream_id, set(node.dependencies)) for node in order}
    lone = {node.node_id for node in order if node.stream_id != stream and node.node_id not in concurrent}
    _keep_transfer_order(graph, order, lone)
    for node_id in lone:
        graph.nodes[node_id].stream_id = stream
    reorder(graph, order)
    if end_of(time_spans(order)) > end_of(spans) + ROUNDING_US:
        for node in order:
            node.stream_id, node.dependencies = old[node.node_id]
        graph.reindex()
        lone = set()
    return len(lone)


def _keep_transfer_order(graph: ExecutionGraph, order: list[ExecutionNode], leaving: set[str]) -> None:
    """Adds edges between neighbours of a lane, both transfers, of which at least one leaves the lane."""
    last: dict[Lane, str] = {}
    for node in order:
        if not node.op_type.is_comm:
            continue
        before = last.get(lane(node))
        if before is not None and not leaving.isdisjoint((before, node.node_id)):
            graph.add_edge(before, node.node_id)
        last[lane(node)] = node.node_id


def _concurrent_nodes(order: list[ExecutionNode], spans: Mapping[str, Span]) -> set[str]:
    """The nodes that run at the same time as one of another lane."""
    found: set[str] = set()
    latest: dict[Lane, ExecutionNode] = {}
    for node in sorted(order, key=lambda one: spans[one.node_id]):
        start, end = spans[node.node_id]
        if end - start < ROUNDING_US:
            continue
        for other in latest.values():
            # An earlier node of a lane ended before its latest one started, so only the latest can still run.
            if lane(other) != lane(node) and spans[other.node_id].end_us > start + ROUNDING_US:
                found |= {node.node_id, other.node_id}
        latest[lane(node)] = node
    return found
