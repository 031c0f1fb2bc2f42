"""Splitting of a graph's layers into micro-batches, each over a share of the rows."""

from __future__ import annotations

from dataclasses import replace

from sageLLM.runtime.core.ir.dims import Dim, Expr
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.core.passes.part_sizes import attrs_with_sizes, sizes_of_part, sizes_of_whole, with_sizes
from sageLLM.runtime.core.passes.rows import PART, join_rows, split_rows

COUNTS = ("flops", "bytes")
"""Attributes of plain nodes that count work, which is proportional to the rows."""


def why_not_divisible(graph: ExecutionGraph, parts: int) -> str | None:
    """The reason why a graph cannot be split into micro-batches, or None.

    With bound sizes the parts are numbers of rows, so a hybrid step, with rows of two phases, cannot be split. With
    symbolic sizes the parts are any ranges of rows, each with its own sizes.
    """
    if not any(node.layer_id is not None for node in graph.nodes.values()):
        return "the graph is without layers"
    if any(node.op_type.name == "ENCODER_ATTN" for node in graph.nodes.values()):
        return "attention over whole sequences cannot be split"
    rows = [ref.shape[0] for ref in entering(graph)]
    if not rows:
        return "no value enters the layers"
    if len(set(rows)) > 1:
        return "the values that enter the layers have different numbers of rows"
    if is_symbolic(graph):
        return None
    if graph.stage == "hybrid":
        return "a hybrid step has rows of two phases"
    refs = [ref for node in graph.nodes.values() for ref in (*node.inputs, *node.outputs)]
    symbolic = next((ref for ref in refs if not ref.is_bound), None)
    if symbolic is not None:
        return f"the size of {symbolic} is symbolic"
    return f"{rows[0]} rows are too few for {parts} micro-batches" if int(str(rows[0])) < parts else None


def entering(graph: ExecutionGraph) -> list[TensorRef]:
    """The values from outside the layers, except caches and weights, that nodes of layers read."""
    found: dict[str, TensorRef] = {}
    for node in graph.nodes.values():
        if node.layer_id is not None and not node.op_type.is_kv:
            for ref in node.inputs:
                producer = graph.producer(ref)
                if ref.name not in graph.weights and (producer is None or producer.layer_id is None):
                    found.setdefault(ref.name, ref)
    return list(found.values())


def is_symbolic(graph: ExecutionGraph) -> bool:
    """Whether the number of rows that enter the layers is symbolic."""
    return any(isinstance(ref.shape[0], Expr) for ref in entering(graph))


def share_of(whole: Dim, part: int, parts: int) -> int:
    """The size of part number `part` of `parts`; sizes differ by at most one and sum to the whole."""
    assert isinstance(whole, int), "sizes are bound"
    return whole * (part + 1) // parts - whole * part // parts


class MicroBatches:
    """Builder of the split graph: the value of each micro-batch for an old value, and the nodes written so far.

    With bound sizes, micro-batches have equal shares of the rows. With symbolic sizes, each has sizes of its own
    (`part_sizes.py`), and those of the step are their sums.
    """

    def __init__(self, graph: ExecutionGraph, parts: int, split: type[OpNode], join: type[OpNode]) -> None:
        self.source, self.parts, self.split, self.join = graph, parts, split, join
        self.result = replace(
            graph, nodes={}, prefill_nodes=set(), decode_nodes=set(), comm_nodes=set(), outputs=list(graph.outputs)
        )
        self.values: dict[str, list[TensorRef]] = {}
        self.entering = {ref.name for ref in entering(graph)}
        self.is_symbolic = is_symbolic(graph)
        self.joined: set[str] = set()
        self.memo: Memo = {}

    def build(self) -> ExecutionGraph:
        """The graph with all layers split; TypeMismatch if an op does not accept a share of its rows."""
        for node in self.source.topological_sort():
            if node.layer_id is None:
                self._join_for(node.inputs, node)
                self._copy(node)
            else:
                self._split_for(node)
                for part in range(self.parts):
                    self._write(node, part)
        self._join_for(self.result.outputs, next(reversed(self.source.nodes.values())))
        self._order_stores()
        self.result.inputs = {name: self._whole(ref) for name, ref in self.source.inputs.items()}
        self.result.outputs = [self._whole(ref) for ref in self.source.outputs]
        return self.result

    def _copy(self, node: ExecutionNode) -> None:
        copied = node.copy()
        copied.dependencies = {new for old in self._control(node) for new in self._replacements(old)}
        copied.inputs = [self._whole(ref) for ref in node.inputs]
        copied.outputs = [self._whole(ref) for ref in node.outputs]
        if self.is_symbolic:
            copied.attrs = attrs_with_sizes(node.attrs, sizes_of_whole(self.parts))
        self.result.add_node(copied)

    def _write(self, node: ExecutionNode, part: int) -> None:
        inputs = [self.values[ref.name][part] if ref.name in self.values else ref for ref in node.inputs]
        copied = node.copy()
        copied.node_id, copied.inputs = f"{node.node_id}.p{part}", inputs
        copied.dependencies = {new for old in self._control(node) for new in self._replacements(old, part)}
        copied.metadata[PART] = part
        if "call" in node.metadata:  # each micro-batch calls the block
            copied.metadata["call"] = f"{node.metadata['call']}.p{part}"
        copied.origins = (node.node_id,)
        copied.outputs = self._outputs(node, inputs, part)
        if self.is_symbolic:
            copied.attrs = attrs_with_sizes(node.attrs, sizes_of_part(part))
        else:
            copied.attrs = {name: self._attr(name, value, node, part) for name, value in node.attrs.items()}
            copied.memory_bytes = sum(ref.num_bytes for ref in copied.outputs)
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            self.values.setdefault(old.name, []).append(new)
        self.result.add_node(copied)

    def _outputs(self, node: ExecutionNode, inputs: list[TensorRef], part: int) -> list[TensorRef]:
        shapes = [self._part(ref, part).shape for ref in node.outputs]
        if isinstance(node, OpNode):  # inferred, since not every op returns a row per row of its input
            refs = dict(zip(node.operands, inputs, strict=True))
            shapes = [type_.shape for type_ in node.resolve_refs(refs, node.attrs, self.memo).outputs]
        named = zip(node.outputs, shapes, strict=True)
        return [replace(ref, name=f"{ref.name}.p{part}", shape=shape) for ref, shape in named]

    def _whole(self, ref: TensorRef) -> TensorRef:
        """The old value with the sizes of the split graph."""
        return with_sizes(ref, sizes_of_whole(self.parts)) if self.is_symbolic else ref

    def _part(self, ref: TensorRef, part: int) -> TensorRef:
        """The share of an old value that a micro-batch has."""
        if self.is_symbolic:
            return with_sizes(ref, sizes_of_part(part), f".p{part}")
        shape = (share_of(ref.shape[0], part, self.parts), *ref.shape[1:]) if ref.shape else ()
        return replace(ref, name=f"{ref.name}.p{part}", shape=shape)

    def _attr(self, name: str, value: AttrValue, node: ExecutionNode, part: int) -> AttrValue:
        is_count = name in COUNTS and not isinstance(node, OpNode) and isinstance(value, int)
        return share_of(value, part, self.parts) if is_count and isinstance(value, int) else value

    def _split_for(self, node: ExecutionNode) -> None:
        """Splits the values from outside the layers before their first use."""
        for ref in node.inputs:
            if ref.name in self.entering and ref.name not in self.values:
                parts = [self._part(ref, part) for part in range(self.parts)]
                for new in split_rows(self.split, node, self._whole(ref), parts):
                    self.result.add_node(new)
                self.values[ref.name] = parts

    def _join_for(self, refs: list[TensorRef], like: ExecutionNode) -> None:
        """Joins the parts of values that leave the layers, under their old names."""
        for ref in refs:
            if ref.name in self.values and ref.name not in self.entering | self.joined:
                self.joined.add(ref.name)
                for new in join_rows(self.join, like, self.values[ref.name], ref.name):
                    self.result.add_node(new)

    def _control(self, node: ExecutionNode) -> set[str]:
        """The dependencies of a node other than the producers of its inputs."""
        producers = [self.source.producer(ref) for ref in node.inputs]
        return node.dependencies - {producer.node_id for producer in producers if producer is not None}

    def _replacements(self, node_id: str, part: int | None = None) -> list[str]:
        """The new nodes of an old one, of all micro-batches or of one."""
        if self.source.nodes[node_id].layer_id is None:
            return [node_id]
        return [f"{node_id}.p{i}" for i in range(self.parts) if part is None or i == part]

    def _order_stores(self) -> None:
        """Orders the KV stores of a micro-batch before the attention of the next one.

        Rows of one sequence may be in two micro-batches: the later rows attend to keys that the earlier ones store.
        """
        stores = [node for node in self.source.nodes.values() if node.op_type.is_kv and not node.outputs]
        for store in (node for node in stores if node.layer_id is not None):
            producers = [self.source.producer(ref) for ref in store.inputs]
            node_ids = sorted({p.node_id for p in producers if p is not None and p.layer_id is not None})
            for part in range(1, self.parts):
                for node_id in node_ids:
                    self.result.add_edge(f"{store.node_id}.p{part - 1}", f"{node_id}.p{part}")
