"""Expansion of a block graph to a kernel graph: every call of a block is replaced by the ops of its body."""

from __future__ import annotations

from collections.abc import Hashable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from sageLLM.runtime.core.ir.dims import Dim, free_symbols
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.core.model.layout import Block, ModelLayout
from sageLLM.runtime.core.passes.events import WAITS
from sageLLM.runtime.core.passes.part_sizes import (
    DIVIDED,
    Sizes,
    attrs_with_sizes,
    sizes_before,
    sizes_of_part,
    with_sizes,
)
from sageLLM.runtime.core.passes.rows import PART


def expand(graph: ExecutionGraph, layout: ModelLayout, config: Any) -> ExecutionGraph:
    """The kernel graph of a block graph; `config` is the one that the graph was built with (a rank's share, under tp).

    Nodes keep their layer, device and stream; those of a block have its block-level nodes as origins. The two halves
    of a hybrid step are one call of the body. KV loads from a slower tier stay; all other KV nodes of the block level
    disappear, since the body stores its own keys and values. Planned waits are dropped, since they name block nodes.

    In a graph with micro-batches every part reads inputs of its own, such as `pos.p0: i32[T0]`, and the caches as the
    part before it has left them. Raises ValueError for a graph without a stage or of kernel level, and for
    micro-batches with bound sizes.
    """
    if graph.level != "block" or graph.stage is None:
        raise ValueError(f"graph {graph.graph_id!r}: expected a block-level graph with a stage")
    parts = [node for node in graph.nodes.values() if PART in node.metadata]
    if any(ref.is_bound for node in parts for ref in node.outputs):
        raise ValueError(f"graph {graph.graph_id!r}: expected micro-batches with symbolic sizes, got bound sizes")
    expanded = _Expansion(graph, graph.stage, layout, config).run()
    if parts:
        # Sizes are solved in the order of the inputs, and those of the step are sums over the parts.
        by_size = sorted(expanded.inputs.items(), key=lambda item: ".p" not in item[0])
        expanded.inputs = dict(by_size)
    return expanded


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch: the suffix of its values, and its sizes. None stands for all rows of the step."""

    number: int | None

    @property
    def suffix(self) -> str:
        return "" if self.number is None else f".p{self.number}"

    @property
    def sizes(self) -> Sizes:
        return {} if self.number is None else sizes_of_part(self.number)

    def shape(self, ref: TensorRef) -> tuple[Dim, ...]:
        return ref.shape if self.number is None else with_sizes(ref, self.sizes).shape


_WHOLE = _Part(None)


class _Op(NamedTuple):
    """A node of a pattern: its operands by their names in the pattern, its results without the layer's prefix."""

    node: ExecutionNode
    operands: list[str]
    results: list[tuple[str, TensorRef]]


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A block's body as written for one layer.

    Bodies use the layer number in names only, so the pattern is copied for the other layers of the variant, which
    avoids running the body and its shape inference again.
    """

    device_id: int
    args: list[TensorRef]
    ops: list[_Op]
    results: tuple[TensorRef, ...]
    shared: dict[str, TensorRef]
    own_weights: list[tuple[str, TensorRef]]
    own_inputs: list[tuple[str, TensorRef]]

    @classmethod
    def of(
        cls,
        layer: int,
        args: list[TensorRef],
        nodes: list[ExecutionNode],
        results: tuple[TensorRef, ...],
        graph: ExecutionGraph,
    ) -> _Pattern:
        """Sorts the operands into this layer's own weights and caches, and the values that all layers share."""
        prefix, folder = f"L{layer}.", f"layers.{layer}."
        read = {ref.name: ref for node in nodes for ref in node.inputs}
        own = {name: (name.removeprefix(folder), ref) for name, ref in read.items() if name.startswith(folder)}
        ops = [
            _Op(node, [r.name for r in node.inputs], [(r.name.removeprefix(prefix), r) for r in node.outputs])
            for node in nodes
        ]
        return cls(
            nodes[0].device_id,
            args,
            ops,
            results,
            {name: ref for name, ref in read.items() if name in graph.inputs and name not in own},
            [named for name, named in own.items() if name in graph.weights],
            [named for name, named in own.items() if name in graph.inputs],
        )


class _Expansion:
    """One pass over the block graph in order, writing the kernel graph."""

    def __init__(self, graph: ExecutionGraph, stage: Stage, layout: ModelLayout, config: Any) -> None:
        self.source, self.stage, self.layout, self.config = graph, stage, layout, config
        self.writer = GraphWriter(graph.graph_id, level="kernel", stage=stage, dtype=_model_dtype(graph))
        self.written: dict[str, TensorRef] = {}  # block-level value -> the kernel-level value that replaces it
        self.made: dict[str, tuple[str, ...]] = {}  # block-level node -> the kernel-level nodes that end it
        self.waiting: dict[str, list[ExecutionNode]] = {}  # call -> its nodes so far
        self.sizes = _call_sizes(graph)
        self.patterns: dict[tuple[str, Hashable], _Pattern] = {}
        self.caches: dict[str, TensorRef] = {}  # cache -> its value after the micro-batches so far

    def run(self) -> ExecutionGraph:
        for node in self.source.topological_sort():
            call = node.metadata.get("call")
            if call is None or _is_slow_load(node):
                self._copy(node)
            elif not node.op_type.is_kv:  # the body itself stores and loads keys and values on the device
                members = self.waiting.setdefault(call, [])
                members.append(node)
                if len(members) == self.sizes[call]:
                    self._inline(members)
        graph = self.writer.finish([self._current(ref) for ref in self.source.outputs])
        graph.num_layers, graph.model_config = self.source.num_layers, self.source.model_config
        return self._with_declared(graph)

    def _copy(self, node: ExecutionNode) -> None:
        """Copies a node that is not part of a block: its values keep their names, its inputs follow the expansion."""
        inputs = [self._current(ref) for ref in node.inputs]
        copied = replace(node, inputs=inputs, outputs=list(node.outputs), dependencies=self._control(node))
        copied.attrs = node.attrs.copy()
        copied.metadata = {key: deepcopy(value) for key, value in node.metadata.items() if key != WAITS}
        self.writer.graph.add_node(copied)
        self.made[node.node_id] = (copied.node_id,)

    def _inline(self, members: list[ExecutionNode]) -> None:
        """Writes the body of the block that the nodes of one call represent."""
        first, last = members[0], members[-1]
        block = self._block(first)
        layer = first.layer_id
        assert layer is not None, f"block node {first.node_id} belongs to no layer"
        # In a hybrid step both members have the same arguments, and the last one's outputs are the joined values.
        args = [self._current(ref) for ref in first.inputs if not self._is_cache_value(ref)]
        key = (block.name, block.variant_of(self.config, layer))
        pattern = self.patterns.get(key)
        is_new = pattern is None or pattern.device_id != first.device_id  # refs of a pattern contain its device
        if PART in first.metadata:
            if pattern is None or is_new:
                pattern = self.patterns[key] = self._whole_pattern(block, first, layer, args)
            made, results = self._repeat(pattern, first, layer, args, _Part(first.metadata[PART]))
            self._chain_caches(made, layer)
        elif pattern is None or is_new:
            made, results = self._write_body(self.writer, block, first, layer, args)
            self.patterns[key] = _Pattern.of(layer, args, made, results, self.writer.graph)
        else:
            made, results = self._repeat(pattern, first, layer, args, _WHOLE)
        self._finish_call(members, made)
        outputs = last.outputs if len(members) > 1 else first.outputs
        self.written |= {ref.name: result for ref, result in zip(outputs, results, strict=False)}

    def _write_body(
        self, writer: GraphWriter, block: Block, node: ExecutionNode, layer: int, args: list[TensorRef]
    ) -> tuple[list[ExecutionNode], tuple[TensorRef, ...]]:
        graph = writer.graph
        count = len(graph.nodes)
        writer.device_id, writer.stream_id = node.device_id, node.stream_id
        with writer.layer(layer), writer.block_scope(block.name, node.node_id):
            results = block.body(writer, self.config, self.stage, layer, *args)
        writer.device_id, writer.stream_id = 0, 0
        return list(islice(reversed(graph.nodes.values()), len(graph.nodes) - count))[::-1], results

    def _whole_pattern(self, block: Block, node: ExecutionNode, layer: int, args: list[TensorRef]) -> _Pattern:
        """The pattern of a block in micro-batches: its body for all rows of the step, in a graph of its own."""
        writer = GraphWriter(block.name, level="kernel", stage=self.stage, dtype=self.writer.dtype)
        whole = [with_sizes(ref, sizes_before(node.metadata[PART])) for ref in args]
        made, results = self._write_body(writer, block, node, layer, whole)
        return _Pattern.of(layer, whole, made, results, writer.graph)

    def _chain_caches(self, made: list[ExecutionNode], layer: int) -> None:
        """Makes the caches that a micro-batch has written the ones that the next one reads.

        The next one writes to the same memory, so it does that after the last read of this one.
        """
        graph, folder = self.writer.graph, f"layers.{layer}."
        caches = {name: ref for name, ref in graph.inputs.items() if name.startswith(folder)}
        current = {self.caches.get(name, ref).name: name for name, ref in caches.items()}
        for node in made:
            if not isinstance(node, OpNode):
                continue
            for output, operand in node.inplace.items():
                ref = node.optional_input(operand)
                if ref is not None and ref.name in current:
                    for user in graph.users(ref):
                        if user is not node:
                            graph.add_edge(user.node_id, node.node_id)
                    self.caches[current[ref.name]] = node.output(output)

    def _repeat(
        self, pattern: _Pattern, block_node: ExecutionNode, layer: int, args: list[TensorRef], part: _Part
    ) -> tuple[list[ExecutionNode], tuple[TensorRef, ...]]:
        """The pattern's nodes for another layer or micro-batch, which differ in names and sizes only."""
        writer, device, stream, block = self.writer, block_node.device_id, block_node.stream_id, block_node.block
        refs = {name: self._shared(ref, part) for name, ref in pattern.shared.items()}
        refs |= {old.name: new for old, new in zip(pattern.args, args, strict=True)}
        for name, ref in pattern.own_weights:
            refs[ref.name] = writer.weight(f"layers.{layer}.{name}", ref.dtype, *ref.shape)
        for name, ref in pattern.own_inputs:
            cache = writer.input(f"layers.{layer}.{name}", ref.dtype, *ref.shape)
            refs[ref.name] = self.caches.get(cache.name, cache)
        made: list[ExecutionNode] = []
        prefix = f"L{layer}."
        for old, operands, results in pattern.ops:
            outputs = [
                TensorRef(prefix + name + part.suffix, part.shape(ref), ref.dtype, device) for name, ref in results
            ]
            for (_, ref), output in zip(results, outputs, strict=True):
                refs[ref.name] = output
            inputs = [refs[name] for name in operands]
            # Copied without `emit`: types are those of the pattern, and inference would dominate the time.
            node = type(old)(outputs[0].name, old.op_type, inputs, outputs, set(), device, stream)
            node.layer_id, node.block, node.attrs, node.metadata = layer, block, old.attrs.copy(), old.metadata.copy()
            if part.number is not None:
                node.attrs, node.metadata[PART] = attrs_with_sizes(old.attrs, part.sizes), part.number
            writer.graph.add_node(node)
            made.append(node)
        return made, tuple(refs[ref.name] for ref in pattern.results)

    def _shared(self, ref: TensorRef, part: _Part) -> TensorRef:
        """An input of all layers, or that of a micro-batch if its size depends on the rows."""
        if part.number is None:
            return ref
        is_divided = any(free_symbols(size) & DIVIDED for size in ref.shape)
        return self.writer.input(ref.name + part.suffix * is_divided, ref.dtype, *part.shape(ref))

    def _finish_call(self, members: list[ExecutionNode], made: list[ExecutionNode]) -> None:
        ids = tuple(node.node_id for node in members)
        control = set().union(*(self._control(node) for node in members))
        for node in made:
            node.origins = ids
        for before in control if made else ():
            self.writer.graph.add_edge(before, made[0].node_id)
        self.made |= dict.fromkeys(ids, (made[-1].node_id,) if made else ())

    def _block(self, node: ExecutionNode) -> Block:
        if node.block is None or node.block not in self.layout.blocks:
            raise ValueError(f"{node.node_id}: unknown block '{node.block}' in layout '{self.layout.name}'")
        return self.layout.blocks[node.block]

    def _is_cache_value(self, ref: TensorRef) -> bool:
        """Whether a value is the result of a block-level KV load: the body reads the cache itself."""
        producer = self.source.producer(ref)
        return producer is not None and producer.op_type.is_kv and not isinstance(producer, OpNode)

    def _control(self, node: ExecutionNode) -> set[str]:
        """The kernel-level nodes of a node's dependencies other than the producers of its inputs."""
        if not node.dependencies:
            return set()
        data = {producer.node_id for ref in node.inputs if (producer := self.source.producer(ref)) is not None}
        loads = {d for d in data if self.source.nodes[d].op_type.is_kv}
        return {new for d in (node.dependencies - data) | loads for new in self.made.get(d, ())}

    def _current(self, ref: TensorRef) -> TensorRef:
        return self.written.get(ref.name, ref)

    def _with_declared(self, graph: ExecutionGraph) -> ExecutionGraph:
        """Declares the inputs and weights that nodes outside of blocks read, in the source's order."""
        graph.inputs = {**self._read(self.source.inputs, graph), **graph.inputs}
        graph.weights = {**self._read(self.source.weights, graph), **graph.weights}
        return graph

    def _read(self, declared: dict[str, TensorRef], graph: ExecutionGraph) -> dict[str, TensorRef]:
        return {name: ref for name, ref in declared.items() if graph.users(name)}


def _is_slow_load(node: ExecutionNode) -> bool:
    """Whether a KV node accesses a tier other than the device, which the body does not do."""
    return node.op_type.is_kv and node.metadata.get("tier", "device") != "device"


def _call_sizes(graph: ExecutionGraph) -> dict[str, int]:
    """The number of nodes of each call of a block, without KV nodes."""
    sizes: dict[str, int] = {}
    for node in graph.nodes.values():
        call = node.metadata.get("call")
        if call is not None and not node.op_type.is_kv:
            sizes[call] = sizes.get(call, 0) + 1
    return sizes


def _model_dtype(graph: ExecutionGraph) -> str:
    """The model's element type, that of all weights."""
    return next((ref.dtype for ref in graph.weights.values()), "f32")
