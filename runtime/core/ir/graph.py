"""The execution graph: nodes, the values between them, and the questions that schedulers and passes ask of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from sageLLM.runtime.core.errors import IRError, VerifyError
from sageLLM.runtime.core.ir.dims import Dim, Expr, evaluate
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.order import critical_path, topological_order, total_time
from sageLLM.runtime.core.ir.verify import find_problems

Level: TypeAlias = Literal["block", "kernel"]
Stage: TypeAlias = Literal["prefill", "decode", "hybrid"]


@dataclass
class ExecutionGraph:
    """One step of a model as a graph of nodes that read and write named values.

    `nodes` keeps insertion order. `inputs` (step inputs and caches) and `weights` are the values that no node writes;
    `outputs` are what the step returns. A node depends on the writers of its inputs; further ordering is given by
    `dependencies` or `add_edge`. Change a graph through its methods: a node whose tensors are edited in place needs
    `reindex()` afterwards.

    Membership: COMM_* nodes are in `comm_nodes`. In a prefill graph all nodes are prefill nodes, in a decode graph all
    are decode nodes. In a hybrid graph, and in one without a stage, `metadata["phase"]` decides where it is given;
    else PREFILL_ATTN is prefill and DECODE_ATTN is decode; else in a block-level hybrid graph KV_STORE is prefill and
    KV_LOAD is decode; every other node of a hybrid graph serves both, and of a graph without a stage neither.

    `model_config` is the caller's own object; it is left out of comparisons and of the text and JSON forms.
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
    _writers: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _readers: dict[str, dict[str, None]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _followers: dict[str, set[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.reindex()

    def add_node(self, node: ExecutionNode) -> None:
        """Add a node, make it depend on the nodes added before that write its inputs, and enter it in its sets.

        Raises IRError if the id is taken.
        """
        if node.node_id in self.nodes:
            raise IRError(f"graph {self.graph_id!r} already has a node {node.node_id!r}")
        self.nodes[node.node_id] = node
        self._index(node)
        self._classify(node)

    def add_edge(self, from_node: str, to_node: str) -> None:
        """Let `to_node` wait for `from_node`; IRError if either is unknown. A cycle shows when the graph is sorted."""
        for node_id in (from_node, to_node):
            if node_id not in self.nodes:
                raise IRError(f"no edge {from_node!r} -> {to_node!r}: graph {self.graph_id!r} has no node {node_id!r}")
        dependencies = self.nodes[to_node].dependencies
        if from_node not in dependencies:
            dependencies.add(from_node)
            self._followers.setdefault(from_node, set()).add(to_node)

    def producer(self, value: TensorRef | str) -> ExecutionNode | None:
        """The node that writes a value (the last added, if several do); None for inputs, weights and unknown names."""
        writers = self._writers.get(_name(value))
        return self.nodes[writers[-1]] if writers else None

    def users(self, value: TensorRef | str) -> list[ExecutionNode]:
        """The nodes that read a value, in the order they came to read it."""
        return [self.nodes[node_id] for node_id in self._readers.get(_name(value), ())]

    def topological_sort(self) -> list[ExecutionNode]:
        """All nodes, dependencies first; among those that are ready, the one inserted first.

        Raises CycleError naming the nodes of one cycle in order, and IRError for an unknown dependency.
        """
        return topological_order(self.nodes, self.graph_id)

    def get_critical_path(self) -> list[ExecutionNode]:
        """The chain of dependent nodes with the largest sum of `estimated_time_us`, first to last.

        Of equally long chains the one with more nodes. Streams and devices do not count. Empty for an empty graph.
        """
        return critical_path(self.topological_sort())

    def estimate_total_time(self) -> float:
        """Microseconds from the start to the last finish.

        Nodes of one (device_id, stream_id) run one after another in topological order; different streams and devices
        overlap; each node starts after its dependencies have finished.
        """
        return total_time(self.topological_sort())

    def get_subgraph(self, node_ids: Iterable[str]) -> ExecutionGraph:
        """A new graph with copies of the given nodes in this graph's order; this graph is not changed.

        Dependencies on nodes outside are dropped, and the sets hold only what was in them here. A value that is read
        inside and written outside becomes an input; one that is written inside and is an output here, or is read
        outside, becomes an output. Raises IRError for an unknown id.
        """
        wanted = set(node_ids)
        if unknown := sorted(wanted - self.nodes.keys()):
            raise IRError(f"graph {self.graph_id!r} has no node {', '.join(map(repr, unknown))}")
        nodes = {node_id: node.copy() for node_id, node in self.nodes.items() if node_id in wanted}
        for node in nodes.values():
            node.dependencies &= wanted
        written = {ref.name for node in nodes.values() for ref in node.outputs}
        read = {ref.name: ref for node in nodes.values() for ref in node.inputs}
        return replace(
            self,
            nodes=nodes,
            prefill_nodes=self.prefill_nodes & wanted,
            decode_nodes=self.decode_nodes & wanted,
            comm_nodes=self.comm_nodes & wanted,
            inputs={n: ref for n, ref in read.items() if n not in written and n not in self.weights},
            weights={n: ref for n, ref in self.weights.items() if n in read},
            outputs=self._values_wanted_outside(nodes),
        )

    def bind(self, **symbols: Dim) -> ExecutionGraph:
        """A new graph with sizes in place of symbols, e.g. `graph.bind(T=128, B=4)`; unused names are ignored."""
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
        """A graph whose nodes and sets are its own."""
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
        """Put new nodes in the place of the last old one, in this graph.

        `renames` says which value readers of an old value get instead. Data dependencies are derived anew; what else
        the old nodes waited for, the new ones wait for, and what waited for an old node waits for all new ones. It
        costs O(1) in the size of the graph if there is one new node and it has the id of an old one. Raises IRError,
        and changes nothing, if an id is unknown or taken, or if a value would be lost that is still wanted.
        """
        old = {_id(node): self._known(_id(node)) for node in old_nodes}
        renamed = dict(renames or {})
        self._check_replacement(old, new_nodes, renamed)
        waits = {d for node in old.values() for d in node.dependencies - self._data_dependencies(node)} - old.keys()
        followers = {f for node_id in old for f in self._followers.get(node_id, ())} - old.keys()
        values = {ref.name for node in old.values() for ref in node.outputs} | renamed.keys()
        readers = {r for name in values for r in self._readers.get(name, ())} - old.keys()
        for node in old.values():
            self._unindex(node)
        self._insert(old, new_nodes)
        for node in new_nodes:
            node.dependencies = (node.dependencies - old.keys()) | waits
            self._index(node)
            self._classify(node)
        self._rename(renamed, readers)
        for node_id in readers | followers:
            node = self.nodes[node_id]
            node.dependencies = (node.dependencies - old.keys()) | self._data_dependencies(node)
        for node_id in followers:
            for before in [node.node_id for node in new_nodes] or sorted(waits):
                self.add_edge(before, node_id)

    def verify(self) -> None:
        """Raise VerifyError with all problems: see `sageLLM.runtime.core.ir.verify`."""
        self.reindex()
        if problems := find_problems(self):
            raise VerifyError(problems)

    def reindex(self) -> None:
        """Rebuild the lists of writers and readers after nodes were edited in place; dependencies stay as they are."""
        self._writers, self._readers, self._followers = {}, {}, {}
        for node in self.nodes.values():
            self._index(node, derive=False)

    def _index(self, node: ExecutionNode, *, derive: bool = True) -> None:
        """Enter a node's values; writers first seen now are those of nodes before it."""
        data = self._data_dependencies(node)
        for dependency in node.dependencies - data:
            self._followers.setdefault(dependency, set()).add(node.node_id)
        if derive:
            node.dependencies |= data
        for ref in node.inputs:
            self._readers.setdefault(ref.name, {})[node.node_id] = None
        for ref in node.outputs:
            self._writers.setdefault(ref.name, []).append(node.node_id)

    def _unindex(self, node: ExecutionNode) -> None:
        for ref in node.inputs:
            self._readers.get(ref.name, {}).pop(node.node_id, None)
        for ref in node.outputs:
            writers = self._writers.get(ref.name, [])
            if node.node_id in writers:
                writers.remove(node.node_id)
        self._followers.pop(node.node_id, None)
        for dependency in node.dependencies:
            self._followers.get(dependency, set()).discard(node.node_id)
        for members in (self.prefill_nodes, self.decode_nodes, self.comm_nodes):
            members.discard(node.node_id)

    def _data_dependencies(self, node: ExecutionNode) -> set[str]:
        writers = self._writers
        found = {writers[ref.name][-1] for ref in node.inputs if writers.get(ref.name)}
        found.discard(node.node_id)
        return found

    def _classify(self, node: ExecutionNode) -> None:
        if node.op_type.is_comm:
            self.comm_nodes.add(node.node_id)
        phases = self.phases_of(node)
        if "prefill" in phases:
            self.prefill_nodes.add(node.node_id)
        if "decode" in phases:
            self.decode_nodes.add(node.node_id)

    def phases_of(self, node: ExecutionNode) -> tuple[str, ...]:
        """Which of "prefill" and "decode" a node serves in this graph, by the rule of membership above."""
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

    def _values_wanted_outside(self, nodes: Mapping[str, ExecutionNode]) -> list[TensorRef]:
        kept = {ref.name for ref in self.outputs}
        return [
            ref
            for node in nodes.values()
            for ref in node.outputs
            if ref.name in kept or any(user not in nodes for user in self._readers.get(ref.name, ()))
        ]

    def _check_replacement(
        self, old: Mapping[str, ExecutionNode], new: Sequence[ExecutionNode], renames: Mapping[str, TensorRef | str]
    ) -> None:
        added: set[str] = set()
        for node in new:
            if node.node_id in added or (node.node_id in self.nodes and node.node_id not in old):
                raise IRError(f"graph {self.graph_id!r} already has a node {node.node_id!r}")
            added.add(node.node_id)
        rewritten = {ref.name for node in new for ref in node.outputs} | renames.keys()
        returned = {ref.name for ref in self.outputs}
        for ref in (ref for node in old.values() for ref in node.outputs if ref.name not in rewritten):
            readers = [r for r in self._readers.get(ref.name, ()) if r not in old]
            if readers or ref.name in returned:
                wanted_by = readers[0] if readers else "the graph's caller"
                raise IRError(f"replacing {', '.join(old)} would lose {ref.name!r}, which {wanted_by} reads")

    def _insert(self, old: Mapping[str, ExecutionNode], new: Sequence[ExecutionNode]) -> None:
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
        self.nodes.clear()
        self.nodes.update(placed)

    def _rename(self, renames: Mapping[str, TensorRef | str], readers: Iterable[str]) -> None:
        if not renames:
            return
        targets = {name: self._ref(target) for name, target in renames.items()}
        for node in (self.nodes[r] for r in readers):
            for name in {ref.name for ref in node.inputs} & targets.keys():
                self._readers[name].pop(node.node_id, None)
                self._readers.setdefault(targets[name].name, {})[node.node_id] = None
            node.inputs = [targets.get(ref.name, ref) for ref in node.inputs]
        self.outputs = [targets.get(ref.name, ref) for ref in self.outputs]

    def _ref(self, value: TensorRef | str) -> TensorRef:
        if isinstance(value, TensorRef):
            return value
        writer = self.producer(value)
        refs = writer.outputs if writer else [*self.inputs.values(), *self.weights.values()]
        for ref in refs:
            if ref.name == value:
                return ref
        raise IRError(f"graph {self.graph_id!r} has no value {value!r}")

    def _known(self, node_id: str) -> ExecutionNode:
        if node_id not in self.nodes:
            raise IRError(f"graph {self.graph_id!r} has no node {node_id!r}")
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
