"""Takes away what nobody needs."""

from __future__ import annotations

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode


def drop_unread(graph: ExecutionGraph) -> int:
    """Removes the nodes whose results are neither read nor returned; gives their number.

    What communicates, or changes a cache, stays. What waited for a removed node waits for what that one waited for.
    """
    returned = {ref.name for ref in graph.outputs}
    num_nodes = len(graph.nodes)
    for node in reversed(graph.topological_sort()):
        if not _has_effect(graph, node) and not any(graph.users(ref) or ref.name in returned for ref in node.outputs):
            graph.replace([node], [])
    return num_nodes - len(graph.nodes)


def _has_effect(graph: ExecutionGraph, node: ExecutionNode) -> bool:
    """Whether a node does more than give its results: it talks to others, or writes memory that is not its own."""
    if node.op_type.is_comm or not node.outputs:
        return True
    return node.op_type.is_kv or (isinstance(node, OpNode) and bool(node.inplace))
