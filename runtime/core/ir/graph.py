"""Execution graph: the nodes of one step, the values between them, and the queries of schedulers and passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.ir.dims import Dim, Expr, evaluate
from sageLLM.runtime.core.ir.index import GraphIndex
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.order import critical_path, end_of, time_spans, topological_order

Level: TypeAlias = Literal["block", "kernel"]
Stage: TypeAlias = Literal["prefill", "decode", "hybrid"]


@dataclass
class ExecutionGraph:
    """One step of a model as a graph of nodes that read and write named values.

    `nodes` keeps insertion order. `inputs` (step inputs and caches) and `weights` are the values that no node writes;
    `outputs` are the values that the step returns. A node depends on the producers of its inputs; `dependencies` and
    `add_edge` order nodes further. Change a graph through its methods: after editing a node's tensors in place, call
    `reindex()`.

    Membership: COMM_* nodes are in `comm_nodes`. In a prefill graph all nodes are prefill nodes, in a decode graph all
    are decode nodes. In a hybrid graph, and in one without a stage, `metadata["phase"]` decides if it is set; else
    PREFILL_ATTN is prefill and DECODE_ATTN is decode; else in a block-level hybrid graph KV_STORE is prefill and
    KV_LOAD is decode; every other node of a hybrid graph serves both, and of a graph without a stage neither.

    `model_config` belongs to the caller; comparisons and the text and JSON forms ignore it.
    """

    graph_id: str
    nodes: dict[str, ExecutionNode] = field(default_factory=dict)
    prefill_nodes: set[str] = field(default_factory=set)
    decode_nodes: set[str] = field(default_factory=set)
    comm_nodes: set[str] = field(default_factory=set)
    num_layers: int = 0
    model_config: Any = field(default=None, compare=False)
    level: Level = "block"
    stage: Stage | None = None
    inputs: dict[str, TensorRef] = field(default_factory=dict)
    weights: dict[str, TensorRef] = field(default_factory=dict)
    outputs: list[TensorRef] = field(default_factory=list)
    _index: GraphIndex = field(default_factory=GraphIndex, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.reindex()

    def add_node(self, node: ExecutionNode) -> None:
        """Adds a node, with dependencies on the producers of its inputs that were added before, and its membership.

        Raises IRError if the id is taken.
        """
        if node.node_id in self.nodes:
            raise IRError(f"graph {self.graph_id!r} already has a node {node.node_id!r}")
        self.nodes[node.node_id] = node
        self._enter(node)

    def add_edge(self, from_node: str, to_node: str) -> None:
        """Makes `to_node` wait for `from_node`; IRError if either is unknown. Cycles are found by sorting, not here."""
        for node_id in (from_node, to_node):
            if node_id not in self.nodes:
                raise IRError(f"edge {from_node!r} -> {to_node!r}: unknown node {node_id!r} in graph {self.graph_id!r}")
        dependencies = self.nodes[to_node].dependencies
        if from_node not in dependencies:
            dependencies.add(from_node)
            self._index.add_edge(from_node, to_node)

    def producer(self, value: TensorRef | str) -> ExecutionNode | None:
        """The node that writes a value (the last added, if several do); None for inputs, weights and unknown names."""
        node_id = self._index.producer_of(_name(value))
        return None if node_id is None else self.nodes[node_id]

    def users(self, value: TensorRef | str) -> list[ExecutionNode]:
        """The nodes that read a value, in the order in which they became its users."""
        return [self.nodes[node_id] for node_id in self._index.users_of(_name(value))]

    def topological_sort(self) -> list[ExecutionNode]:
        """All nodes, dependencies first; of several ready nodes the one inserted first, so the order is reproducible.

        Raises CycleError naming the nodes of one cycle in order, and IRError for an unknown dependency.
        """
        return topological_order(self.nodes, self.graph_id)

    def get_critical_path(self) -> list[ExecutionNode]:
        """The chain of dependent nodes with the largest sum of `estimated_time_us`, first to last.

        Of equally long chains the one with more nodes. Streams and devices are ignored. Empty for an empty graph.
        """
        return critical_path(self.topological_sort())

    def estimate_total_time(self) -> float:
        """Microseconds from the start of the step to the end of its last node.

        Nodes of one (device_id, stream_id) run one after another in topological order; different streams and devices
        overlap; each node starts after its dependencies have finished.
        """
        return end_of(time_spans(self.topological_sort()))

    def get_subgraph(self, node_ids: Iterable[str]) -> ExecutionGraph:
        """A new graph with copies of the selected nodes in this graph's order; this graph is not changed.

        Dependencies on nodes outside are dropped, and membership is kept. A value that is read inside and written
        outside becomes an input; one that is written inside and is an output here, or is read outside, becomes an
        output. Raises IRError for an unknown id.
        """
        selected = set(node_ids)
        if unknown := sorted(selected - self.nodes.keys()):
            raise IRError(f"graph {self.graph_id!r}: unknown node {', '.join(map(repr, unknown))}")
        nodes = {node_id: node.copy() for node_id, node in self.nodes.items() if node_id in selected}
        for node in nodes.values():
            node.dependencies &= selected
        written = {ref.name for node in nodes.values() for ref in node.outputs}
        read = {ref.name: ref for node in nodes.values() for ref in node.inputs}
        return replace(
            self,
            nodes=nodes,
            prefill_nodes=self.prefill_nodes & selected,
            decode_nodes=self.decode_nodes & selected,
            comm_nodes=self.comm_nodes & selected,
            inputs={n: ref for n, ref in read.items() if n not in written and n not in self.weights},
            weights={n: ref for n, ref in self.weights.items() if n in read},
            outputs=self._values_used_outside(nodes),
        )

    def bind(self, **symbols: Dim) -> ExecutionGraph:
        """A new graph with sizes for symbols, e.g. `graph.bind(T=128, B=4)`; names without a symbol are ignored."""
        bound: dict[TensorRef, TensorRef] = {}

        def concrete(ref: TensorRef) -> TensorRef:
            if ref not in bound:
                shape = tuple(evaluate(size, symbols) for size in ref.shape)
                bound[ref] = ref if shape == ref.shape else replace(ref, shape=shape)
            return bound[ref]

        nodes = {node_id: node.copy() for node_id, node in self.nodes.items()}
        for node in nodes.values():
            node.inputs = [concrete(ref) for ref in node.inputs]
            node.outputs = [concrete(ref) for ref in node.outputs]
            node.attrs = {name: _bind_attr(value, symbols) for name, value in node.attrs.items()}
        return replace(
            self,
            nodes=nodes,
            prefill_nodes=set(self.prefill_nodes),
            decode_nodes=set(self.decode_nodes),
            comm_nodes=set(self.comm_nodes),
            inputs={name: concrete(ref) for name, ref in self.inputs.items()},
            weights={name: concrete(ref) for name, ref in self.weights.items()},
            outputs=[concrete(ref) for ref in self.outputs],
        )

    def copy(self) -> ExecutionGraph:
        """A copy that shares no node, list or set with this graph."""
        return replace(
            self,
            nodes={node_id: node.copy() for node_id, node in self.nodes.items()},
            prefill_nodes=set(self.prefill_nodes),
            decode_nodes=set(self.decode_nodes),
            comm_nodes=set(self.comm_nodes),
            inputs=dict(self.inputs),
            weights=dict(self.weights),
            outputs=list(self.outputs),
        )

    def replace(
        self,
        old_nodes: Iterable[ExecutionNode | str],
        new_nodes: Sequence[ExecutionNode],
        renames: Mapping[str, TensorRef | str] | None = None,
    ) -> None:
        """Replaces nodes in place; the new nodes take the position of the last old one.

        `renames` maps an old value to the one that its users read instead. Data dependencies are derived again; other
        dependencies of the old nodes pass to the new ones, and nodes that waited for an old node wait for all new
        ones. It costs O(1) in the size of the graph if there is one new node and it has the id of an old one. Raises
        IRError, and changes nothing, if an id is unknown or taken, or if a value that is still used would be lost.
        """
        index = self._index
        old = {_id(node): self._known(_id(node)) for node in old_nodes}
        renamed = dict(renames or {})
        self._check_replacement(old, new_nodes, renamed)
        # Everything that depends on the old index entries is read before the first of them is removed.
        waits = {d for node in old.values() for d in node.dependencies - index.data_dependencies(node)} - old.keys()
        successors = {s for node_id in old for s in index.successors.get(node_id, ())} - old.keys()
        values = {ref.name for node in old.values() for ref in node.outputs} | renamed.keys()
        users = {user for name in values for user in index.users_of(name)} - old.keys()
        for node in old.values():
            self._leave(node)
        self._insert(old, new_nodes)
        for node in new_nodes:
            node.dependencies = (node.dependencies - old.keys()) | waits
            self._enter(node)
        self._rename(renamed, users)
        for node_id in users | successors:
            node = self.nodes[node_id]
            node.dependencies = (node.dependencies - old.keys()) | index.data_dependencies(node)
        for node_id in successors:
            for before in [node.node_id for node in new_nodes] or sorted(waits):
                self.add_edge(before, node_id)

    def reindex(self) -> None:
        """Rebuilds the producer and user tables after nodes were edited in place; dependencies are not changed."""
        self._index = GraphIndex()
        for node in self.nodes.values():
            self._index.add(node)

    def _enter(self, node: ExecutionNode) -> None:
        """Adds a node to the tables and the membership sets, and derives its data dependencies."""
        node.dependencies |= self._index.add(node)
        if node.op_type.is_comm:
            self.comm_nodes.add(node.node_id)
        phases = self.phases_of(node)
        if "prefill" in phases:
            self.prefill_nodes.add(node.node_id)
        if "decode" in phases:
            self.decode_nodes.add(node.node_id)

    def _leave(self, node: ExecutionNode) -> None:
        self._index.remove(node)
        for members in (self.prefill_nodes, self.decode_nodes, self.comm_nodes):
            members.discard(node.node_id)

    def phases_of(self, node: ExecutionNode) -> tuple[str, ...]:
        """The phases ("prefill", "decode") that a node serves in this graph, by the membership rule of the class."""
        if self.stage in ("prefill", "decode"):
            return (self.stage,)
        if "phase" in node.metadata:
            return (str(node.metadata["phase"]),)
        kind = node.op_type.name
        if kind in _PHASE_OF:
            return (_PHASE_OF[kind],)
        if self.stage is None:
            return ()
        if self.level == "block" and kind in _PHASE_OF_BLOCK:
            return (_PHASE_OF_BLOCK[kind],)
        return ("prefill", "decode")

    def _values_used_outside(self, nodes: Mapping[str, ExecutionNode]) -> list[TensorRef]:
        kept = {ref.name for ref in self.outputs}
        return [
            ref
            for node in nodes.values()
            for ref in node.outputs
            if ref.name in kept or any(user not in nodes for user in self._index.users_of(ref.name))
        ]

    def _check_replacement(
        self, old: Mapping[str, ExecutionNode], new: Sequence[ExecutionNode], renames: Mapping[str, TensorRef | str]
    ) -> None:
        added: set[str] = set()
        for node in new:
            if node.node_id in added or (node.node_id in self.nodes and node.node_id not in old):
                raise IRError(f"graph {self.graph_id!r} already has a node {node.node_id!r}")
            added.add(node.node_id)
        replaced = {ref.name for node in new for ref in node.outputs} | renames.keys()
        returned = {ref.name for ref in self.outputs}
        for ref in (ref for node in old.values() for ref in node.outputs if ref.name not in replaced):
            users = [user for user in self._index.users_of(ref.name) if user not in old]
            if users or ref.name in returned:
                user = users[0] if users else "the graph's caller"
                raise IRError(f"replacing {', '.join(old)} would lose {ref.name!r}, which {user} reads")

    def _insert(self, old: Mapping[str, ExecutionNode], new: Sequence[ExecutionNode]) -> None:
        # A dict keeps the position of a key that is assigned again. Any other insertion rebuilds the dict, which
        # would make a pass of n rewrites quadratic.
        if len(new) == 1 and new[0].node_id in old:
            for node_id in old.keys() - {new[0].node_id}:
                del self.nodes[node_id]
            self.nodes[new[0].node_id] = new[0]
            return
        last = max(old, key=list(self.nodes).index, default=None)
        placed: dict[str, ExecutionNode] = {}
        for node_id, node in self.nodes.items():
            if node_id not in old:
                placed[node_id] = node
            if node_id == last:
                placed.update((n.node_id, n) for n in new)
        if last is None:
            placed.update((n.node_id, n) for n in new)
        self.nodes.clear()  # in place, since callers may hold the dict
        self.nodes.update(placed)

    def _rename(self, renames: Mapping[str, TensorRef | str], users: Iterable[str]) -> None:
        if not renames:
            return
        targets = {name: self._ref(target) for name, target in renames.items()}
        for node in (self.nodes[user] for user in users):
            self._index.redirect(node, targets)
            node.inputs = [targets.get(ref.name, ref) for ref in node.inputs]
        self.outputs = [targets.get(ref.name, ref) for ref in self.outputs]

    def _ref(self, value: TensorRef | str) -> TensorRef:
        if isinstance(value, TensorRef):
            return value
        producer = self.producer(value)
        refs = producer.outputs if producer else [*self.inputs.values(), *self.weights.values()]
        for ref in refs:
            if ref.name == value:
                return ref
        raise IRError(f"graph {self.graph_id!r}: unknown value {value!r}")

    def _known(self, node_id: str) -> ExecutionNode:
        if node_id not in self.nodes:
            raise IRError(f"graph {self.graph_id!r}: unknown node {node_id!r}")
        return self.nodes[node_id]


_PHASE_OF = {"PREFILL_ATTN": "prefill", "DECODE_ATTN": "decode"}
_PHASE_OF_BLOCK = {"KV_STORE": "prefill", "KV_LOAD": "decode"}


def _name(value: TensorRef | str) -> str:
    return value if isinstance(value, str) else value.name


def _id(node: ExecutionNode | str) -> str:
    return node if isinstance(node, str) else node.node_id


def _bind_attr(value: AttrValue, symbols: Mapping[str, Dim]) -> AttrValue:
    if isinstance(value, tuple):
        return tuple(_bind_attr(item, symbols) for item in value)
    return evaluate(value, symbols) if isinstance(value, Expr) else value
