"""Transitive dependencies of a graph's nodes as bit sets."""

from __future__ import annotations

from collections.abc import Iterable

from sageLLM.runtime.core.ir.nodes import ExecutionNode


class Reachability:
    """For every node the set of all nodes that it waits for, kept current while edges are added and nodes merged.

    A set is an int with one bit per node: a union is one machine operation per 64 nodes, and a query one `&`.
    """

    def __init__(self, order: Iterable[ExecutionNode]) -> None:
        """`order` is topologically sorted."""
        self.bit: dict[str, int] = {}
        self.before: dict[str, int] = {}
        for i, node in enumerate(order):
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
        """Makes `later`, and all nodes that depend on it, wait for a node."""
        before = self.before[node_id] | self.bit[node_id]
        for other, mask in self.before.items():
            if other == later or mask & self.bit[later]:
                self.before[other] = mask | before

    def tie(self, node_ids: list[str]) -> None:
        """Treats nodes as one: each waits for the dependencies of all, and nodes that wait for one wait for all."""
        inside = before = 0
        for node_id in node_ids:
            inside |= self.bit[node_id]
            before |= self.before[node_id]
        for node_id, mask in self.before.items():
            if self.bit[node_id] & inside or mask & inside:
                self.before[node_id] = mask | before | (inside & ~self.bit[node_id] if mask & inside else 0)
