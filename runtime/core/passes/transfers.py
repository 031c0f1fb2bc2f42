"""Moves nodes to other devices, with a send and a receive wherever a value is needed on a device that has it not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.order import take_over
from sageLLM.runtime.core.passes.rows import PART

GROUP = "af"
"""The process group of the transfers: the ranks of all pools of devices."""
SEND_STREAM, RECV_STREAM = 1, 2
"""The streams of transfers, so that a device sends, receives and computes at the same time."""


def move_nodes(graph: ExecutionGraph, devices: Mapping[str, int], send: type[OpNode], recv: type[OpNode]) -> int:
    """Moves the nodes of the op types that `devices` names, and the collectives behind them; gives their number."""
    return _Mover(graph, devices, send, recv).run()


class _Mover:
    """Rewrites the nodes in order, noting where each value is."""

    def __init__(
        self, graph: ExecutionGraph, devices: Mapping[str, int], send: type[OpNode], recv: type[OpNode]
    ) -> None:
        self.source, self.devices, self.send, self.recv = graph, devices, send, recv
        self.result = replace(
            graph, nodes={}, prefill_nodes=set(), decode_nodes=set(), comm_nodes=set(), inputs={}, weights={}
        )
        self.values: dict[tuple[str, int], TensorRef] = {}
        self.home: dict[str, int] = {}

    def run(self) -> int:
        num_moved = 0
        for node in self.source.topological_sort():
            device = self._device(node)
            num_moved += device != node.device_id
            self._place(node, device)
        last = next(reversed(self.source.nodes.values()))
        self.result.outputs = [self._on(ref, ref.device_id, last) for ref in self.source.outputs]
        self.result.inputs = {name: self.result.inputs.get(name, ref) for name, ref in self.source.inputs.items()}
        self.result.weights = {name: self.result.weights.get(name, ref) for name, ref in self.source.weights.items()}
        take_over(self.source, self.result)
        return num_moved

    def _device(self, node: ExecutionNode) -> int:
        if node.op_type.name in self.devices:
            return self.devices[node.op_type.name]
        if node.op_type.is_comm:
            return next((self.home[ref.name] for ref in node.inputs if ref.name in self.home), node.device_id)
        return node.device_id

    def _place(self, node: ExecutionNode, device: int) -> None:
        placed = node.copy()
        data = {w.node_id for ref in node.inputs if (w := self.source.producer(ref)) is not None}
        placed.device_id, placed.dependencies = device, node.dependencies - data
        placed.inputs = [self._on(ref, device, node) for ref in node.inputs]
        placed.outputs = [replace(ref, device_id=device) for ref in node.outputs]
        for ref in placed.outputs:
            self.values[ref.name, device] = ref
            self.home[ref.name] = device
        self.result.add_node(placed)

    def _on(self, ref: TensorRef, device: int, reader: ExecutionNode) -> TensorRef:
        if ref.name not in self.home:
            return self._declare(ref, device)
        if (ref.name, device) not in self.values:
            self.values[ref.name, device] = self._transfer(ref.name, device, reader)
        return self.values[ref.name, device]

    def _declare(self, ref: TensorRef, device: int) -> TensorRef:
        """An input or a weight is there where it is needed; one that several devices read, on the first of them."""
        table = self.result.weights if ref.name in self.source.weights else self.result.inputs
        return table.setdefault(ref.name, replace(ref, device_id=device))

    def _transfer(self, name: str, device: int, reader: ExecutionNode) -> TensorRef:
        source = self.home[name]
        sent = replace(self.values[name, source], name=f"{name}.to{device}")
        received = replace(sent, name=f"{name}.on{device}", device_id=device)
        self._add(self.send, self.values[name, source], sent, source, device, reader)
        self._add(self.recv, sent, received, device, source, reader)
        return received

    def _add(self, op: type[OpNode], x: TensorRef, y: TensorRef, device: int, peer: int, reader: ExecutionNode) -> None:
        stream = SEND_STREAM if op is self.send else RECV_STREAM
        node = op(y.name, op.kind, [x], [y], device_id=device, stream_id=stream, layer_id=reader.layer_id)
        node.attrs = {"peer": peer, "group": GROUP}
        if PART in reader.metadata:
            node.metadata[PART] = reader.metadata[PART]
        self.result.add_node(node)
