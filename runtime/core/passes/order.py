"""Node order and contents of a graph that a pass changes in place."""

from __future__ import annotations

from collections.abc import Mapping

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode


def reorder(graph: ExecutionGraph, order: list[ExecutionNode] | None = None) -> None:
    """Lists the nodes in a valid order: `order`, by default the graph's topological order."""
    nodes = order if order is not None else graph.topological_sort()
    graph.nodes = {node.node_id: node for node in nodes}


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
