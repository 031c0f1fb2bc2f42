"""What must run before what: reachability as bit sets, the order of a graph's nodes, and the effects on caches."""

from __future__ import annotations

from collections.abc import Mapping

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode

Lane = tuple[int, int]
"""A device and a stream on it, whose nodes run one after another."""


def lane(node: ExecutionNode) -> Lane:
    return node.device_id, node.stream_id


class Reachability:
    """For every node the set of those that it waits for, directly or not; it follows new edges and merges."""

    def __init__(self, graph: ExecutionGraph) -> None:
        self.bit: dict[str, int] = {}
        self.before: dict[str, int] = {}
        for i, node in enumerate(graph.topological_sort()):
            self.bit[node.node_id] = 1 << i
            mask = 0
            for dependency in node.dependencies:
                mask |= self.before[dependency] | self.bit[dependency]
            self.before[node.node_id] = mask

    def waits_for(self, node_id: str, other: str) -> bool:
        """Whether a node can only run after the other."""
        return bool(self.before[node_id] & self.bit[other])

    def are_independent(self, node_id: str, other: str) -> bool:
        """Whether neither of two nodes waits for the other."""
        return not (self.waits_for(node_id, other) or self.waits_for(other, node_id))

    def add_edge(self, node_id: str, later: str) -> None:
        """From now on `later` waits for a node, and so does what follows it."""
        before = self.before[node_id] | self.bit[node_id]
        for other, mask in self.before.items():
            if other == later or mask & self.bit[later]:
                self.before[other] = mask | before

    def tie(self, node_ids: list[str]) -> None:
        """From now on the nodes run as one: each waits for what one of them waits for, and so does what follows."""
        inside = before = 0
        for node_id in node_ids:
            inside |= self.bit[node_id]
            before |= self.before[node_id]
        for node_id, mask in self.before.items():
            if self.bit[node_id] & inside or mask & inside:
                self.before[node_id] = mask | before | (inside & ~self.bit[node_id] if mask & inside else 0)


def put_in_order(graph: ExecutionGraph, order: list[ExecutionNode] | None = None) -> None:
    """Lists the nodes in an order in which they can run: the one given, or the graph's own."""
    nodes = order if order is not None else graph.topological_sort()
    graph.nodes = {node.node_id: node for node in nodes}


def take_over(graph: ExecutionGraph, other: ExecutionGraph) -> None:
    """Makes the graph what a changed copy of it is; the copy is not to be used afterwards."""
    graph.nodes = other.nodes
    graph.prefill_nodes, graph.decode_nodes, graph.comm_nodes = (
        other.prefill_nodes,
        other.decode_nodes,
        other.comm_nodes,
    )
    graph.inputs, graph.weights, graph.outputs = other.inputs, other.weights, other.outputs
    graph.reindex()


def order_cache_effects(graph: ExecutionGraph) -> None:
    """Adds the edges that keep reads and writes of a cache in program order, where no value does.

    A block-level KV_STORE or KV_MIGRATE changes caches that it only lists as inputs. What reads such a cache before it
    has to be done, and what reads it afterwards has to wait.
    """
    last_write: dict[str, str] = {}
    reads: dict[str, list[str]] = {}
    for node in graph.topological_sort():
        names = [ref.name for ref in node.inputs if ref.name in graph.inputs]
        for name in names:
            if name in last_write:
                graph.add_edge(last_write[name], node.node_id)
            if changes_caches(node):
                for reader in reads.pop(name, []):
                    graph.add_edge(reader, node.node_id)
                last_write[name] = node.node_id
            else:
                reads.setdefault(name, []).append(node.node_id)


def changes_caches(node: ExecutionNode) -> bool:
    """Whether a block-level node writes to a cache that it lists as an input."""
    return not isinstance(node, OpNode) and node.op_type.name in ("KV_STORE", "KV_MIGRATE")


def is_on_device(node: ExecutionNode) -> bool:
    """Whether a node is a load of keys and values that are on the device already: no transfer, and no new memory."""
    return node.op_type.name == "KV_LOAD" and node.metadata.get("tier") == "device"


def bottom_levels(graph: ExecutionGraph) -> Mapping[str, float]:
    """For every node the longest time from its start to the end of the step, dependencies alone counted."""
    levels: dict[str, float] = {}
    behind: dict[str, float] = {}
    for node in reversed(graph.topological_sort()):
        levels[node.node_id] = node.estimated_time_us + behind.get(node.node_id, 0.0)
        for dependency in node.dependencies:
            behind[dependency] = max(behind.get(dependency, 0.0), levels[node.node_id])
    return levels
