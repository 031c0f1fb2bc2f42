"""Node order and contents of a graph that a pass changes in place."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.passes.rows import PART


def reorder(graph: ExecutionGraph, order: list[ExecutionNode] | None = None) -> None:
    """Lists the nodes in a valid order: `order`, by default the graph's topological order."""
    nodes = order if order is not None else graph.topological_sort()
    graph.nodes = {node.node_id: node for node in nodes}


def part_by_part(graph: ExecutionGraph) -> list[ExecutionNode]:
    """The nodes in a valid order in which a micro-batch goes through all layers before the next one begins.

    A pipeline stage then sends the first micro-batch when it begins to compute the second.
    """
    users: dict[str, list[str]] = {}
    num_missing = {node_id: len(node.dependencies) for node_id, node in graph.nodes.items()}
    for node_id, node in graph.nodes.items():
        for dependency in node.dependencies:
            users.setdefault(dependency, []).append(node_id)
    place = {id_: (int(str(node.metadata.get(PART, -1))), i, id_) for i, (id_, node) in enumerate(graph.nodes.items())}
    ready = sorted(place[node_id] for node_id, num in num_missing.items() if num == 0)
    order = []
    while ready:
        *_, node_id = heapq.heappop(ready)
        order.append(graph.nodes[node_id])
        for user in users.get(node_id, ()):
            num_missing[user] -= 1
            if num_missing[user] == 0:
                heapq.heappush(ready, place[user])
    return order


def replace_contents(graph: ExecutionGraph, other: ExecutionGraph) -> None:
    """Moves the contents of a changed copy into the graph; the copy must not be used afterwards."""
    graph.nodes = other.nodes
    graph.prefill_nodes, graph.decode_nodes, graph.comm_nodes = (
        other.prefill_nodes,
        other.decode_nodes,
        other.comm_nodes,
    )
    graph.inputs, graph.weights, graph.outputs = other.inputs, other.weights, other.outputs
    graph.reindex()


def bottom_levels(graph: ExecutionGraph) -> Mapping[str, float]:
    """For every node the longest time from its start to the end of the step, by dependencies alone."""
    levels: dict[str, float] = {}
    after: dict[str, float] = {}
    for node in reversed(graph.topological_sort()):
        levels[node.node_id] = node.estimated_time_us + after.get(node.node_id, 0.0)
        for dependency in node.dependencies:
            after[dependency] = max(after.get(dependency, 0.0), levels[node.node_id])
    return levels
