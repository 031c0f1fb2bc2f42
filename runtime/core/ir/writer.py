"""Graph writer that generated builders call: adds nodes with unique names, inferred types, layers and origins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sageLLM.runtime.core.errors import IRError, TypeMismatch
from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Level, Stage
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, OpTypeBase, TensorRef
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.core.ir.types import TensorType


class GraphWriter:
    """Writes one graph. `dtype` is the model's element type, with which builders declare inputs and weights."""

    def __init__(
        self, graph_id: str, *, level: Level, stage: Stage | None, dtype: str, device_id: int = 0, stream_id: int = 0
    ) -> None:
        self.graph = ExecutionGraph(graph_id, level=level, stage=stage)
        self.level, self.stage, self.dtype = level, stage, dtype
        self.device_id, self.stream_id = device_id, stream_id
        self._memo: Memo = {}
        self._taken: dict[str, int] = {}  # value name -> the last number appended to it
        self._layers: set[int] = set()
        self._layer_id: int | None = None
        self._block: str | None = None
        self._origins: tuple[str, ...] = ()
        self._prefix = ""

    def input(self, name: str, dtype: str, *shape: Dim) -> TensorRef:
        """A step input or a cache; later calls return the same ref. IRError if it was declared with another type."""
        return self._declare(self.graph.inputs, name, dtype, shape)

    def weight(self, name: str, dtype: str, *shape: Dim) -> TensorRef:
        """A weight of the model; later calls return the same ref. IRError if it was declared with another type."""
        return self._declare(self.graph.weights, name, dtype, shape)

    @contextmanager
    def layer(self, i: int | None) -> Iterator[None]:
        """Nodes written inside belong to layer i, and their names start with `L{i}.`; None means outside of layers."""
        saved = self._layer_id, self._prefix
        self._layer_id = i
        if i is not None:
            self._layers.add(i)
            self._prefix = f"L{i}."
        try:
            yield
        finally:
            self._layer_id, self._prefix = saved

    @contextmanager
    def block_scope(self, block: str, origin: str) -> Iterator[None]:
        """Nodes written inside have the block node `origin` as origin and the block's name in their names."""
        saved = self._block, self._origins, self._prefix
        self._block, self._origins, self._prefix = block, (origin,), f"{self._prefix}{block}."
        try:
            yield
        finally:
            self._block, self._origins, self._prefix = saved

    def emit(
        self,
        cls: type[OpNode],
        inputs: Mapping[str, TensorRef | None],
        attrs: Mapping[str, AttrValue],
        names: tuple[str, ...],
    ) -> tuple[TensorRef, ...]:
        """Writes an op node and returns its outputs, named prefix + name, made unique by `_1`, `_2`...

        Output types are inferred; missing attributes take their defaults. Raises TypeMismatch if operands or
        attributes do not fit the op's declaration.
        """
        refs = {name: ref for name in cls.input_types if (ref := inputs.get(name)) is not None}
        for name in inputs.keys() - cls.input_types.keys():
            raise TypeMismatch(f"{cls.op}: unknown operand {name!r}, expected {', '.join(cls.input_types)}")
        operands = tuple(refs)
        inference = cls.resolve_refs(refs, attrs, self._memo)
        outputs = self._new_refs(names, inference.outputs, cls.op)
        is_prefix = operands == tuple(cls.input_types)[: len(operands)]
        node = cls(
            outputs[0].name,
            cls.kind,
            list(refs.values()),
            list(outputs),
            attrs=dict(inference.attrs),
            metadata={} if is_prefix else {"operands": list(operands)},
        )
        self._add(node)
        return outputs

    def call_block(
        self,
        block: str | None,
        op_type: OpTypeBase,
        inputs: Sequence[TensorRef],
        names: Sequence[str],
        types: Sequence[TensorType],
        attrs: Mapping[str, AttrValue] | None = None,
        *,
        node_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        dependencies: Sequence[str] = (),
    ) -> tuple[TensorRef, ...]:
        """Writes a block-level node and returns its outputs. Its id is prefix + node_id, by default the first output.

        Raises IRError for a node without outputs (a send, a cache store) and without `node_id`.
        """
        outputs = self._new_refs(tuple(names), tuple(types), block or op_type.name)
        if node_id is None and not outputs:
            raise IRError(f"{block or op_type.name}: a node without outputs must have a node_id")
        full_id = self._unique(node_id) if node_id is not None else outputs[0].name
        node = ExecutionNode(full_id, op_type, list(inputs), list(outputs), set(dependencies))
        node.attrs, node.metadata = dict(attrs or {}), dict(metadata or {})
        self._add(node)
        if block is not None:
            node.block = block
        return outputs

    def finish(self, outputs: Sequence[TensorRef]) -> ExecutionGraph:
        """The finished graph with these outputs; IRError if one is not a value of the graph."""
        for ref in outputs:
            known = self.graph.producer(ref) or ref.name in self.graph.inputs or ref.name in self.graph.weights
            if not known:
                raise IRError(f"graph {self.graph.graph_id!r} returns the unknown value {ref.name!r}")
        self.graph.outputs = list(outputs)
        self.graph.num_layers = len(self._layers)
        return self.graph

    def _declare(self, table: dict[str, TensorRef], name: str, dtype: str, shape: tuple[Dim, ...]) -> TensorRef:
        declared = table.get(name)
        if declared is None:
            if name in self._taken:
                raise IRError(f"{name!r} is already the name of another value")
            self._taken[name] = 0
            declared = table[name] = TensorRef(name, shape, dtype, self.device_id)
        elif declared.shape != shape or declared.dtype != dtype:
            raise IRError(f"{name!r} is already declared as {declared.type}, got {TensorType(dtype, shape)}")
        return declared

    def _new_refs(self, names: tuple[str, ...], types: tuple[TensorType, ...], owner: str) -> tuple[TensorRef, ...]:
        if len(names) != len(types):
            raise IRError(f"{owner}: expected {len(types)} output names, got {len(names)}: {', '.join(names)}")
        return tuple(
            TensorRef(self._unique(name), type_.shape, type_.dtype, self.device_id)
            for name, type_ in zip(names, types, strict=True)
        )

    def _unique(self, name: str) -> str:
        full = self._prefix + name
        if full not in self._taken:
            self._taken[full] = 0
            return full
        # Starts at the last number used: a search from 1 would be quadratic in the number of equal names.
        number = self._taken[full] + 1
        while f"{full}_{number}" in self._taken:
            number += 1
        self._taken[full] = number
        self._taken[f"{full}_{number}"] = 0
        return f"{full}_{number}"

    def _add(self, node: ExecutionNode) -> None:
        node.layer_id, node.block, node.origins = self._layer_id, self._block, self._origins
        node.device_id, node.stream_id = self.device_id, self.stream_id
        self.graph.add_node(node)
