"""Moves nodes to other devices by op type, for disaggregated attention and feed-forward."""

from __future__ import annotations

from collections.abc import Mapping

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.order import reorder, replace_contents
from sageLLM.runtime.core.passes.relocation import Relocation, Transfer
from sageLLM.runtime.core.passes.rows import PART

GROUP = "af"
"""The process group of the transfers: the ranks of all pools of devices."""
SEND_STREAM, RECV_STREAM = 1, 2
"""Streams of the transfers: a device sends, receives and computes at the same time."""


def move_nodes(graph: ExecutionGraph, devices: Mapping[str, int], send: type[OpNode], recv: type[OpNode]) -> int:
    """Moves the nodes of the op types in `devices`, and the collectives of their results; returns their number."""

    def new_nodes(transfer: Transfer) -> tuple[OpNode, OpNode]:
        layer_id = transfer.user.layer_id
        nodes = (
            transfer.node(send, GROUP, layer_id=layer_id, stream_id=SEND_STREAM),
            transfer.node(recv, GROUP, layer_id=layer_id, stream_id=RECV_STREAM),
        )
        for node in nodes if PART in transfer.user.metadata else ():
            node.metadata[PART] = transfer.user.metadata[PART]
        return nodes

    relocation = Relocation(graph, new_nodes)
    num_moved = 0
    for node in graph.topological_sort():
        device = _device_of(node, devices, relocation.home)
        num_moved += device != node.device_id
        relocation.place(node, device)
    result, last = relocation.result, next(reversed(graph.nodes.values()))
    result.outputs = [relocation.on(ref, ref.device_id, last) for ref in graph.outputs]
    result.inputs = {name: result.inputs.get(name, ref) for name, ref in graph.inputs.items()}
    result.weights = {name: result.weights.get(name, ref) for name, ref in graph.weights.items()}
    replace_contents(graph, result)
    return num_moved


def ping_pong(graph: ExecutionGraph) -> None:
    """Orders the nodes so that a micro-batch is sent as soon as it is computed, and the next one is then computed.

    A round is what follows one receive, up to the next send. Without this order, small nodes of the first micro-batch
    that precede a send would wait for the large ones of the next micro-batch.
    """
    rounds: dict[str, int] = {}
    keys: dict[str, tuple[int, int, int]] = {}
    for i, node in enumerate(graph.topological_sort()):
        is_received = node.op_type.name == "COMM_RECV"
        number = max((rounds[before] for before in node.dependencies), default=0) + is_received
        rounds[node.node_id] = number
        # What is not split precedes the first round, or follows the last one.
        keys[node.node_id] = number, node.metadata.get(PART, -1 if number == 0 else len(graph.nodes)), i
    reorder(graph, sorted(graph.nodes.values(), key=lambda node: keys[node.node_id]))


def _device_of(node: ExecutionNode, devices: Mapping[str, int], home: Mapping[str, int]) -> int:
    if node.op_type.name in devices:
        return devices[node.op_type.name]
    if node.op_type.is_comm:  # a collective runs where its operand is: it would otherwise add two transfers
        return next((home[ref.name] for ref in node.inputs if ref.name in home), node.device_id)
    return node.device_id
