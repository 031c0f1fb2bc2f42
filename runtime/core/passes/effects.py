"""Effects of nodes on KV caches, which no value expresses, and the edges that keep them in program order."""

from __future__ import annotations

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode


def order_cache_effects(graph: ExecutionGraph) -> None:
    """Adds the edges that keep reads and writes of a cache in program order.

    A block-level KV_STORE or KV_MIGRATE writes caches that it only lists as inputs, so data dependencies do not order
    it with other users of the cache; a pass that moves nodes between streams would reorder them. A write waits for all
    earlier reads, and a read for the last write.
    """
    last_write: dict[str, str] = {}
    reads: dict[str, list[str]] = {}
    for node in graph.topological_sort():
        names = [ref.name for ref in node.inputs if ref.name in graph.inputs]
        for name in names:
            if name in last_write:
                graph.add_edge(last_write[name], node.node_id)
            if writes_caches(node):
                for reader in reads.pop(name, []):
                    graph.add_edge(reader, node.node_id)
                last_write[name] = node.node_id
            else:
                reads.setdefault(name, []).append(node.node_id)


def writes_caches(node: ExecutionNode) -> bool:
    """Whether a block-level node writes to a cache that it lists as an input."""
    return not isinstance(node, OpNode) and node.op_type.name in ("KV_STORE", "KV_MIGRATE")


def is_on_device(node: ExecutionNode) -> bool:
    """Whether a node loads keys and values from the device's own tier: without a transfer and without new memory."""
    return node.op_type.name == "KV_LOAD" and node.metadata.get("tier") == "device"
