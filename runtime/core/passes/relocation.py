"""Relocation of nodes to devices, with transfers of the values that another device reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode


class Transfer(NamedTuple):
    """A value that crosses devices: `value` is sent as `sent`, which `received` copies; `user` is its first reader."""

    value: TensorRef
    sent: TensorRef
    received: TensorRef
    user: ExecutionNode

    def node(self, op: type[OpNode], group: str, *, layer_id: int | None, stream_id: int = 0) -> OpNode:
        """The node of the send (`op` on the source) or of the receive (`op` on the target)."""
        is_recv = op.kind.name == "COMM_RECV"
        x, y = (self.sent, self.received) if is_recv else (self.value, self.sent)
        peer = self.value.device_id if is_recv else self.received.device_id
        attrs: dict[str, AttrValue] = {"peer": peer, "group": group}
        return op(y.name, op.kind, [x], [y], device_id=y.device_id, stream_id=stream_id, layer_id=layer_id, attrs=attrs)


NewNodes: TypeAlias = Callable[[Transfer], tuple[OpNode, OpNode]]


class Relocation:
    """A copy of a graph, written node by node in order, that tracks on which devices each value exists.

    The send feeds the receive, so that the graph shows a transfer as one chain; each device runs its half. A value is
    transferred once per device, at its first use there.
    """

    def __init__(self, source: ExecutionGraph, new_nodes: NewNodes) -> None:
        """`new_nodes` returns the send and the receive of a transfer."""
        self.source, self.new_nodes = source, new_nodes
        self.result = replace(
            source, nodes={}, prefill_nodes=set(), decode_nodes=set(), comm_nodes=set(), inputs={}, weights={}
        )
        self.home: dict[str, int] = {}  # value -> the device of its producer
        self._values: dict[tuple[str, int], TensorRef] = {}

    def place(self, node: ExecutionNode, device: int) -> None:
        """Adds a copy of a node on a device, after the transfers that it requires."""
        placed = node.copy()
        data = {producer.node_id for ref in node.inputs if (producer := self.source.producer(ref)) is not None}
        placed.device_id, placed.dependencies = device, node.dependencies - data
        placed.inputs = [self.on(ref, device, node) for ref in node.inputs]
        placed.outputs = [replace(ref, device_id=device) for ref in node.outputs]
        for ref in placed.outputs:
            self._values[ref.name, device] = ref
            self.home[ref.name] = device
        self.result.add_node(placed)

    def on(self, ref: TensorRef, device: int, user: ExecutionNode) -> TensorRef:
        """The value as it exists on a device: declared there, produced there, or received."""
        if ref.name not in self.home:
            return self._declare(ref, device)
        if (ref.name, device) not in self._values:
            self._values[ref.name, device] = self._transfer(ref.name, device, user)
        return self._values[ref.name, device]

    def _declare(self, ref: TensorRef, device: int) -> TensorRef:
        """An input or a weight, on the first of the devices that read it."""
        table = self.result.weights if ref.name in self.source.weights else self.result.inputs
        return table.setdefault(ref.name, replace(ref, device_id=device))

    def _transfer(self, name: str, device: int, user: ExecutionNode) -> TensorRef:
        value = self._values[name, self.home[name]]
        sent = replace(value, name=f"{name}.to{device}")
        received = replace(sent, name=f"{name}.on{device}", device_id=device)
        for node in self.new_nodes(Transfer(value, sent, received, user)):
            self.result.add_node(node)
        return received
