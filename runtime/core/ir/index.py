"""Index of a graph's edges: producers and users of values by name, and explicit successors of nodes by id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef


@dataclass(slots=True)
class GraphIndex:
    """Lookup tables that make `producer`, `users` and local replacement independent of the graph's size.

    `producers` lists several nodes only while a graph is invalid or a rewrite is under way. The users are a dict
    without values, which is a set in insertion order: results must not depend on string hashes. `successors` holds
    only the edges that no value implies; the others follow from `users`.
    """

    producers: dict[str, list[str]] = field(default_factory=dict)
    users: dict[str, dict[str, None]] = field(default_factory=dict)
    successors: dict[str, set[str]] = field(default_factory=dict)

    def producer_of(self, value: str) -> str | None:
        """The node added last that writes a value."""
        producers = self.producers.get(value)
        return producers[-1] if producers else None

    def users_of(self, value: str) -> Iterable[str]:
        """The nodes that read a value, in the order in which they were added."""
        return self.users.get(value, ())

    def data_dependencies(self, node: ExecutionNode) -> set[str]:
        """The producers of a node's inputs; a node that updates its own input does not depend on itself."""
        producers = self.producers
        found = {producers[ref.name][-1] for ref in node.inputs if producers.get(ref.name)}
        found.discard(node.node_id)
        return found

    def add(self, node: ExecutionNode) -> set[str]:
        """Enters a node and returns its data dependencies, which count only producers that were added before it."""
        data = self.data_dependencies(node)
        for dependency in node.dependencies - data:
            self.add_edge(dependency, node.node_id)
        for ref in node.inputs:
            self.users.setdefault(ref.name, {})[node.node_id] = None
        for ref in node.outputs:
            self.producers.setdefault(ref.name, []).append(node.node_id)
        return data

    def add_edge(self, from_node: str, to_node: str) -> None:
        """Enters an edge that no value implies."""
        self.successors.setdefault(from_node, set()).add(to_node)

    def remove(self, node: ExecutionNode) -> None:
        """Removes a node with its edges."""
        for ref in node.inputs:
            self.users.get(ref.name, {}).pop(node.node_id, None)
        for ref in node.outputs:
            producers = self.producers.get(ref.name, [])
            if node.node_id in producers:
                producers.remove(node.node_id)
        self.successors.pop(node.node_id, None)
        for dependency in node.dependencies:
            self.successors.get(dependency, set()).discard(node.node_id)

    def redirect(self, node: ExecutionNode, targets: Mapping[str, TensorRef]) -> None:
        """Makes a node a user of the values that replace its inputs; the caller edits the inputs themselves."""
        for name in {ref.name for ref in node.inputs} & targets.keys():
            self.users[name].pop(node.node_id, None)
            self.users.setdefault(targets[name].name, {})[node.node_id] = None
