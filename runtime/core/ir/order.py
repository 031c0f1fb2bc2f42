"""Topological order, lanes, critical path and time spans of a graph's nodes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sageLLM.runtime.core.errors import CycleError, IRError
from sageLLM.runtime.core.ir.nodes import ExecutionNode

Nodes = Mapping[str, ExecutionNode]
Lane = tuple[int, int]
"""A device and a stream of it; the nodes of a lane run one after another."""


class Span(NamedTuple):
    """The run of a node, in microseconds from the start of the step."""

    start_us: float
    end_us: float


def lane(node: ExecutionNode) -> Lane:
    return node.device_id, node.stream_id


def topological_order(nodes: Nodes, graph_id: str) -> list[ExecutionNode]:
    """All nodes, dependencies first; of several ready nodes the one inserted first (Kahn, CACM 5(11), 1962).

    Raises CycleError naming the nodes of one cycle in order, and IRError for an unknown dependency.
    """
    position = {node_id: i for i, node_id in enumerate(nodes)}
    for node in nodes.values():
        unknown = next((d for d in node.dependencies if d not in position), None)
        if unknown is not None:
            raise IRError(f"{node.node_id}: unknown dependency {unknown!r} in graph {graph_id!r}")
    # Builders and passes leave nodes in a valid order, so the common case is a check without a heap.
    if all(position[d] < position[node_id] for node_id, node in nodes.items() for d in node.dependencies):
        return list(nodes.values())
    return _sorted(nodes, position)


def _sorted(nodes: Nodes, position: Mapping[str, int]) -> list[ExecutionNode]:
    waiting_for = {node_id: len(node.dependencies) for node_id, node in nodes.items()}
    successors: dict[str, list[str]] = {}
    for node_id, node in nodes.items():
        for dependency in node.dependencies:
            successors.setdefault(dependency, []).append(node_id)
    by_position = list(nodes.values())
    ready = [position[node_id] for node_id, count in waiting_for.items() if count == 0]
    order: list[ExecutionNode] = []
    while ready:
        node = by_position[heapq.heappop(ready)]
        order.append(node)
        for node_id in successors.get(node.node_id, ()):
            waiting_for[node_id] -= 1
            if waiting_for[node_id] == 0:
                heapq.heappush(ready, position[node_id])
    if len(order) < len(nodes):
        raise CycleError(_find_cycle(nodes, {n for n, count in waiting_for.items() if count}, position))
    return order


def _find_cycle(nodes: Nodes, blocked: set[str], position: Mapping[str, int]) -> list[str]:
    """Walks back from a blocked node; each has a blocked dependency, so the walk closes a cycle."""
    walk: dict[str, None] = {}
    node_id = min(blocked, key=position.__getitem__)
    while node_id not in walk:
        walk[node_id] = None
        node_id = min(nodes[node_id].dependencies & blocked, key=position.__getitem__)
    cycle = list(walk)[list(walk).index(node_id) :][::-1]
    first = cycle.index(min(cycle, key=position.__getitem__))
    return cycle[first:] + cycle[:first]


def critical_path(order: Sequence[ExecutionNode]) -> list[ExecutionNode]:
    """The chain of dependent nodes with the largest total `estimated_time_us`; among equals, that with more nodes.

    `order` is topologically sorted. Zero-time nodes such as views tie often: the longer chain is the informative one.
    """
    longest: dict[str, tuple[float, int]] = {}
    before: dict[str, str | None] = {}
    for node in order:
        best = max(sorted(node.dependencies), key=longest.__getitem__, default=None)
        time, count = longest[best] if best is not None else (0.0, 0)
        longest[node.node_id] = (time + node.estimated_time_us, count + 1)
        before[node.node_id] = best
    nodes = {node.node_id: node for node in order}
    path: list[ExecutionNode] = []
    node_id = max(longest, key=longest.__getitem__, default=None)
    while node_id is not None:
        path.append(nodes[node_id])
        node_id = before[node_id]
    return path[::-1]


def time_spans(order: Sequence[ExecutionNode], times_us: Mapping[str, float] | None = None) -> dict[str, Span]:
    """The spans of sorted nodes: each starts when its lane is free and its dependencies have ended.

    Lanes do not slow down each other. `times_us` are measured durations by node id; the estimate replaces missing ones.
    """
    times = times_us or {}
    spans: dict[str, Span] = {}
    free_at: dict[Lane, float] = {}
    for node in order:
        own = lane(node)
        start = max([free_at.get(own, 0.0), *(spans[d].end_us for d in node.dependencies)])
        end = free_at[own] = start + times.get(node.node_id, node.estimated_time_us)
        spans[node.node_id] = Span(start, end)
    return spans


def end_of(spans: Mapping[str, Span]) -> float:
    """The end of the last span in microseconds; 0 without spans."""
    return max((span.end_us for span in spans.values()), default=0.0)
