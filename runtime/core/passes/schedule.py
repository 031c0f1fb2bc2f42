"""Stream assignment: moves transfers to separate streams, in parallel to computation, and reorders the nodes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import Lane, Span, end_of, lane, time_spans
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.effects import is_on_device, order_cache_effects
from sageLLM.runtime.core.passes.events import plan_events
from sageLLM.runtime.core.passes.lone_nodes import return_lone_nodes
from sageLLM.runtime.core.passes.order import bottom_levels, reorder
from sageLLM.runtime.core.passes.sharing import Share, simulate


class StreamPass(DeclaredPass):
    """Moves nodes by op type to the streams in `streams` (numbered from 1), and list-schedules the graph.

    Nodes that no entry selects keep their stream, and so do loads from the device's own tier. The faster of two orders
    is taken: the old one, and list scheduling by the longest remaining path (Graham, SIAM J. Appl. Math. 17(2), 1969).
    Both are needed: list scheduling is greedy and can be slower than the program order. If neither is faster than the
    graph as it was, nothing changes. `plan_events` writes the waits between lanes to the nodes. In a kernel graph,
    which is executed, nodes that overlap with no other lane then return to stream 0, since an event takes time.

    Streams in `shares` share the device with the others: concurrent nodes slow down, and their estimated times become
    those of `simulate`. Without shares, streams do not slow down each other.
    """

    streams: ClassVar[Mapping[str, frozenset[str]]] = {}
    shares: ClassVar[Mapping[str, Share]] = {}

    def run(self, graph: ExecutionGraph) -> None:
        before = graph.estimate_total_time()
        old_nodes, old_streams = list(graph.nodes.values()), self._assign(graph)
        old_edges = {node.node_id: set(node.dependencies) for node in old_nodes}
        order_cache_effects(graph)
        orders = (graph.topological_sort(), list_schedule(graph))  # of equally fast ones the old order wins
        timed = [(self._spans(graph, order), order) for order in orders]
        spans, best = min(timed, key=lambda item: end_of(item[0]))
        after = end_of(spans)
        if after < before:
            reorder(graph, best)
            for node in graph.nodes.values() if self.shares else ():
                node.estimated_time_us = spans[node.node_id].end_us - spans[node.node_id].start_us
        else:  # without a gain the extra streams and cache edges would only cost events
            self._undo(graph, old_nodes, old_streams, old_edges)
        if self.level == "kernel":
            return_lone_nodes(graph)
        moved = sum(node.stream_id != old_streams[node.node_id] for node in graph.nodes.values())
        facts = {"moved": moved, "waits": plan_events(graph), "us_before": before, "us_after": min(before, after)}
        self.report.facts = {**facts}

    def _spans(self, graph: ExecutionGraph, order: list[ExecutionNode]) -> Mapping[str, Span]:
        reorder(graph, order)
        shares = {i: self.shares[name] for i, name in enumerate(self.streams, start=1) if name in self.shares}
        return simulate(graph, shares) if shares else time_spans(order)

    def _assign(self, graph: ExecutionGraph) -> dict[str, int]:
        """Sets the streams; returns the previous ones."""
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
        reorder(graph, nodes)
        graph.reindex()


def list_schedule(graph: ExecutionGraph) -> list[ExecutionNode]:
    """The nodes by start time if every free lane starts its ready node with the longest path to the end.

    Ties go to the node that is first in the graph, so that the order, and with it the plan of every rank, is the same
    in every process.
    """
    levels = bottom_levels(graph)
    position = {node_id: i for i, node_id in enumerate(graph.nodes)}
    successors: dict[str, list[str]] = {}
    for node in graph.nodes.values():
        for dependency in node.dependencies:
            successors.setdefault(dependency, []).append(node.node_id)
    waiting_for = {node.node_id: len(node.dependencies) for node in graph.nodes.values()}
    ready: dict[Lane, list[tuple[float, int, str]]] = {lane(node): [] for node in graph.nodes.values()}
    for node in graph.nodes.values():
        if not node.dependencies:
            heapq.heappush(ready[lane(node)], (-levels[node.node_id], position[node.node_id], node.node_id))
    running: list[tuple[float, int, str]] = []
    busy: set[Lane] = set()
    order: list[ExecutionNode] = []
    now = 0.0
    while len(order) < len(graph.nodes):
        for free in [one for one, queue in ready.items() if queue and one not in busy]:
            node = graph.nodes[heapq.heappop(ready[free])[2]]
            order.append(node)
            busy.add(free)
            heapq.heappush(running, (now + node.estimated_time_us, position[node.node_id], node.node_id))
        now, _, done = heapq.heappop(running)
        busy.discard(lane(graph.nodes[done]))
        for node_id in successors.get(done, ()):
            waiting_for[node_id] -= 1
            if not waiting_for[node_id]:
                heapq.heappush(ready[lane(graph.nodes[node_id])], (-levels[node_id], position[node_id], node_id))
    return order
