"""Pipeline stages of a block graph: each layer is assigned a device, and values cross by send and receive."""

from __future__ import annotations

from sageLLM.generated.ops import Recv, Send
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.relocation import Relocation, Transfer

GROUP = "pp"


def stage_of_layer(layer: int, num_layers: int, num_stages: int) -> int:
    """The stage that runs a layer; the numbers of layers per stage differ by at most one."""
    return layer * num_stages // num_layers


def split_stages(graph: ExecutionGraph, num_stages: int) -> ExecutionGraph:
    """The same graph with the stage as the device of every node, and a COMM_SEND and COMM_RECV per crossing value.

    Nodes before the layers run on the first stage, nodes after them on the last. Raises ValueError if there are more
    stages than layers.
    """
    if num_stages > graph.num_layers:
        raise ValueError(
            f"pipeline_parallel_size={num_stages} is more than the {graph.num_layers} layers of {graph.graph_id!r}; "
            "use at most one stage per layer"
        )

    def new_nodes(transfer: Transfer) -> tuple[OpNode, OpNode]:
        producer = graph.producer(transfer.value)
        return (
            transfer.node(Send, GROUP, layer_id=producer.layer_id if producer else None),
            transfer.node(Recv, GROUP, layer_id=transfer.user.layer_id),
        )

    relocation = Relocation(graph, new_nodes)
    has_layers_begun = False
    for node in graph.topological_sort():
        has_layers_begun |= node.layer_id is not None
        relocation.place(node, _device_of(node, graph.num_layers, num_stages, has_layers_begun))
    home, last = relocation.home, next(reversed(graph.nodes.values()))
    relocation.result.outputs = [relocation.on(ref, home[ref.name], last) for ref in graph.outputs]
    return relocation.result


def _device_of(node: ExecutionNode, num_layers: int, num_stages: int, has_layers_begun: bool) -> int:
    if node.layer_id is not None:
        return stage_of_layer(node.layer_id, num_layers, num_stages)
    return num_stages - 1 if has_layers_begun else 0
