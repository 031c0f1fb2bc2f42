"""Puts transfers on streams of their own, so that they run beside the computation, and orders the nodes anew."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.events import plan_events
from sageLLM.runtime.core.passes.order import (
    Lane,
    bottom_levels,
    is_on_device,
    lane,
    order_cache_effects,
    put_in_order,
)
from sageLLM.runtime.core.passes.sharing import Share, Span, simulate, time_spans


class StreamPass(DeclaredPass):
    """Moves nodes by op type to the streams that `streams` names (numbered from 1), and list-schedules the graph.

    Nodes that no entry selects stay where they are, and so do loads of what is on the device already. Of the old order
    and the one that favours the longest remaining path (list scheduling; Graham, SIAM J. Appl. Math. 17(2), 1969) the
    faster is taken. A graph that neither would make faster stays as it was. The waits between lanes are noted in the
    nodes; see `plan_events`.

    Streams that `shares` names share the device with the others: nodes that run at the same time slow down, and their
    estimated times become what `simulate` says. Without shares streams do not slow down one another.
    """

    streams: ClassVar[Mapping[str, frozenset[str]]] = {}
    shares: ClassVar[Mapping[str, Share]] = {}

    def run(self, graph: ExecutionGraph) -> None:
        before = graph.estimate_total_time()
        old_nodes, old_streams = list(graph.nodes.values()), self._assign(graph)
        old_edges = {node.node_id: set(node.dependencies) for node in old_nodes}
        order_cache_effects(graph)
        orders = (graph.topological_sort(), list_schedule(graph))
        timed = [(self._spans(graph, order), order) for order in orders]
        spans, best = min(timed, key=lambda item: _end_us(item[0]))
        after = _end_us(spans)
        if after < before:
            put_in_order(graph, best)
            for node in graph.nodes.values() if self.shares else ():
                node.estimated_time_us = spans[node.node_id].end_us - spans[node.node_id].start_us
        else:
            self._undo(graph, old_nodes, old_streams, old_edges)
        moved = sum(node.stream_id != old_streams[node.node_id] for node in graph.nodes.values())
        facts = {"moved": moved, "waits": plan_events(graph), "us_before": before, "us_after": min(before, after)}
        self.report.facts = {**facts}

    def _spans(self, graph: ExecutionGraph, order: list[ExecutionNode]) -> Mapping[str, Span]:
        put_in_order(graph, order)
        shares = {i: self.shares[name] for i, name in enumerate(self.streams, start=1) if name in self.shares}
        return simulate(graph, shares) if shares else time_spans(graph)

    def _assign(self, graph: ExecutionGraph) -> dict[str, int]:
        """Sets the streams; gives those that the nodes had."""
        stream_of = {name: i for i, names in enumerate(self.streams.values(), start=1) for name in names}
        old = {node.node_id: node.stream_id for node in graph.nodes.values()}
        for node in graph.nodes.values():
            if not is_on_device(node):
                node.stream_id = stream_of.get(node.op_type.name, node.stream_id)
        return old

    def _undo(
        self,
        graph: ExecutionGraph,
        nodes: list[ExecutionNode],
        streams: Mapping[str, int],
        edges: Mapping[str, set[str]],
    ) -> None:
        for node in nodes:
            node.stream_id = streams[node.node_id]
            node.dependencies = edges[node.node_id]
        put_in_order(graph, nodes)
        graph.reindex()


def _end_us(spans: Mapping[str, Span]) -> float:
    return max((span.end_us for span in spans.values()), default=0.0)


def list_schedule(graph: ExecutionGraph) -> list[ExecutionNode]:
    """The nodes by start time, when every lane always takes the ready node with the longest path to the end."""
    levels = bottom_levels(graph)
    place = {node_id: i for i, node_id in enumerate(graph.nodes)}
    followers: dict[str, list[str]] = {}
    for node in graph.nodes.values():
        for dependency in node.dependencies:
            followers.setdefault(dependency, []).append(node.node_id)
    waiting_for = {node.node_id: len(node.dependencies) for node in graph.nodes.values()}
    ready: dict[Lane, list[tuple[float, int, str]]] = {lane(node): [] for node in graph.nodes.values()}
    for node in graph.nodes.values():
        if not node.dependencies:
            heapq.heappush(ready[lane(node)], (-levels[node.node_id], place[node.node_id], node.node_id))
    running: list[tuple[float, int, str]] = []
    busy: set[Lane] = set()
    order: list[ExecutionNode] = []
    now = 0.0
    while len(order) < len(graph.nodes):
        for free in [one for one, queue in ready.items() if queue and one not in busy]:
            node = graph.nodes[heapq.heappop(ready[free])[2]]
            order.append(node)
            busy.add(free)
            heapq.heappush(running, (now + node.estimated_time_us, place[node.node_id], node.node_id))
        now, _, done = heapq.heappop(running)
        busy.discard(lane(graph.nodes[done]))
        for node_id in followers.get(done, ()):
            waiting_for[node_id] -= 1
            if not waiting_for[node_id]:
                heapq.heappush(ready[lane(graph.nodes[node_id])], (-levels[node_id], place[node_id], node_id))
    return order
