"""Dead code elimination."""

from __future__ import annotations

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode


def drop_unread(graph: ExecutionGraph) -> int:
    """Removes the nodes with results that are neither read nor returned; returns their number.

    Nodes that communicate or write a cache stay: their effect is not a value, so an unused result proves nothing.
    Nodes that waited for a removed node wait for its dependencies.
    """
    returned = {ref.name for ref in graph.outputs}
    num_nodes = len(graph.nodes)
    for node in reversed(graph.topological_sort()):
        if not _has_effect(graph, node) and not any(graph.users(ref) or ref.name in returned for ref in node.outputs):
            graph.replace([node], [])
    return num_nodes - len(graph.nodes)


def _has_effect(graph: ExecutionGraph, node: ExecutionNode) -> bool:
    """Whether a node has an effect besides its results: it communicates, or writes memory of other values."""
    if node.op_type.is_comm or not node.outputs:
        return True
    return node.op_type.is_kv or (isinstance(node, OpNode) and bool(node.inplace))
