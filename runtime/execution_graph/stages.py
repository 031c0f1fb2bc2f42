"""Pipeline stages of a block graph: each layer is assigned a device, and values cross by send and receive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sageLLM.generated.ops import Recv, Send
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.relocation import Relocation, Transfer

GROUP = "pp"


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """Stage number `index` of a model in stages of `sizes[i]` layers, empty for an undivided model."""

    index: int = 0
    sizes: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return max(len(self.sizes), 1)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """The layers of the stage, of a model with `num_layers`."""
        if not self.sizes:
            return range(num_layers)
        start = sum(self.sizes[: self.index])
        return range(start, start + self.sizes[self.index])


WHOLE = PipelineStage()
"""The only stage of a model that is not divided."""


def split_stages(graph: ExecutionGraph, sizes: Sequence[int]) -> ExecutionGraph:
    """The same graph with the stage as the device of every node, and a COMM_SEND and COMM_RECV per crossing value.

    Stage i has the next `sizes[i]` layers. Nodes before the layers run on the first stage, nodes after them on the
    last.
    """
    assert sum(sizes) == graph.num_layers, f"{graph.graph_id}: stages of {sizes} layers, of {graph.num_layers}"

    def new_nodes(transfer: Transfer) -> tuple[OpNode, OpNode]:
        producer = graph.producer(transfer.value)
        return (
            transfer.node(Send, GROUP, layer_id=producer.layer_id if producer else None),
            transfer.node(Recv, GROUP, layer_id=transfer.user.layer_id),
        )

    relocation = Relocation(graph, new_nodes)
    stage_of_layer = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    outside = 0
    for node in graph.topological_sort():
        if node.layer_id is not None:
            outside = len(sizes) - 1
        relocation.place(node, outside if node.layer_id is None else stage_of_layer[node.layer_id])
    home, last = relocation.home, next(reversed(graph.nodes.values()))
    relocation.result.outputs = [relocation.on(ref, home[ref.name], last) for ref in graph.outputs]
    return relocation.result


def stage_graph(graph: ExecutionGraph, stage: PipelineStage) -> ExecutionGraph:
    """The part of a graph that one stage runs.

    Values from earlier stages are inputs, with the names of `received_values`, and values for later ones are outputs.
    """
    if stage.count == 1:
        return graph
    split = split_stages(graph, stage.sizes)
    return split.get_subgraph(name for name, node in split.nodes.items() if node.device_id == stage.index)


def received_values(graph: ExecutionGraph) -> list[TensorRef]:
    """The inputs of a stage's graph that are buffers of receives; each micro-batch receives rows of them."""
    found: dict[str, TensorRef] = {}
    for node in graph.nodes.values():
        if isinstance(node, Recv):
            buffer = node.inputs[0]
            split = graph.producer(buffer)
            whole = buffer if split is None else split.inputs[0]
            found[whole.name] = whole
    return list(found.values())
