"""The order of a graph's nodes: sorted by what depends on what, and how long that takes at least."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from sageLLM.runtime.core.errors import CycleError, IRError
from sageLLM.runtime.core.ir.nodes import ExecutionNode

Nodes = Mapping[str, ExecutionNode]


def topological_order(nodes: Nodes, graph_id: str) -> list[ExecutionNode]:
    """All nodes, dependencies first; among those that are ready, the one inserted first (Kahn 1962).

    Raises CycleError naming the nodes of one cycle in order, and IRError for an unknown dependency.
    """
    position = {node_id: i for i, node_id in enumerate(nodes)}
    for node in nodes.values():
        unknown = next((d for d in node.dependencies if d not in position), None)
        if unknown is not None:
            raise IRError(f"{node.node_id} depends on {unknown!r}, which graph {graph_id!r} does not have")
    if all(position[d] < position[node_id] for node_id, node in nodes.items() for d in node.dependencies):
        return list(nodes.values())
    return _sorted(nodes, position)


def _sorted(nodes: Nodes, position: Mapping[str, int]) -> list[ExecutionNode]:
    waiting_for = {node_id: len(node.dependencies) for node_id, node in nodes.items()}
    successors: dict[str, list[str]] = {}
    for node_id, node in nodes.items():
        for dependency in node.dependencies:
            successors.setdefault(dependency, []).append(node_id)
    in_place = list(nodes.values())
    ready = [position[node_id] for node_id, count in waiting_for.items() if count == 0]
    order: list[ExecutionNode] = []
    while ready:
        node = in_place[heapq.heappop(ready)]
        order.append(node)
        for node_id in successors.get(node.node_id, ()):
            waiting_for[node_id] -= 1
            if waiting_for[node_id] == 0:
                heapq.heappush(ready, position[node_id])
    if len(order) < len(nodes):
        raise CycleError(_find_cycle(nodes, {n for n, count in waiting_for.items() if count}, position))
    return order


def _find_cycle(nodes: Nodes, blocked: set[str], position: Mapping[str, int]) -> list[str]:
    """Walk back from a blocked node; each has a blocked dependency, so the walk closes a circle."""
    walk: dict[str, None] = {}
    node_id = min(blocked, key=position.__getitem__)
    while node_id not in walk:
        walk[node_id] = None
        node_id = min(nodes[node_id].dependencies & blocked, key=position.__getitem__)
    cycle = list(walk)[list(walk).index(node_id) :][::-1]
    first = cycle.index(min(cycle, key=position.__getitem__))
    return cycle[first:] + cycle[:first]


def critical_path(order: Sequence[ExecutionNode]) -> list[ExecutionNode]:
    """Of sorted nodes the chain of the largest `estimated_time_us`; of equally long ones that with more nodes."""
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


def total_time(order: Sequence[ExecutionNode]) -> float:
    """Microseconds from the start to the last finish of sorted nodes, lane by lane: see `estimate_total_time`."""
    finish: dict[str, float] = {}
    free_at: dict[tuple[int, int], float] = {}
    for node in order:
        lane = (node.device_id, node.stream_id)
        start = max([free_at.get(lane, 0.0), *(finish[d] for d in node.dependencies)])
        finish[node.node_id] = free_at[lane] = start + node.estimated_time_us
    return max(finish.values(), default=0.0)
