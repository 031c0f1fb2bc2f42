"""Pipeline stages of a block graph: each layer is assigned a device, and values cross by send and receive."""

from __future__ import annotations

from dataclasses import dataclass

from sageLLM.generated.ops import Recv, Send
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.relocation import Relocation, Transfer

GROUP = "pp"


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """Stage number `index` of the `count` stages of a model."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """The layers of the stage."""
        start = sum(layers_per_stage(num_layers, self.count)[: self.index])
        return range(start, start + layers_per_stage(num_layers, self.count)[self.index])


WHOLE = PipelineStage()
"""The only stage of a model that is not divided."""


def layers_per_stage(num_layers: int, num_stages: int) -> list[int]:
    """The number of layers of each stage, which differ by at most one.

    As in vLLM, the stages before the last one get the layers that remain: the last stage has the head, too.
    """
    sizes = [num_layers // num_stages] * num_stages
    for i in range(num_layers % num_stages):
        sizes[-2 - i] += 1
    return sizes


def stage_of_layer(layer: int, num_layers: int, num_stages: int) -> int:
    """The stage that runs a layer."""
    return next(i for i in range(num_stages) if layer in PipelineStage(i, num_stages).layers(num_layers))


def why_not_divisible(name: str, num_layers: int, num_stages: int) -> str | None:
    """The reason why the model or graph `name` cannot be divided into this number of stages, or None."""
    if num_stages <= num_layers:
        return None
    return (
        f"pipeline_parallel_size={num_stages} is more than the {num_layers} layers of {name}; "
        "use at most one stage per layer"
    )


def split_stages(graph: ExecutionGraph, num_stages: int) -> ExecutionGraph:
    """The same graph with the stage as the device of every node, and a COMM_SEND and COMM_RECV per crossing value.

    Nodes before the layers run on the first stage, nodes after them on the last. Raises ValueError if there are more
    stages than layers.
    """
    if (reason := why_not_divisible(repr(graph.graph_id), graph.num_layers, num_stages)) is not None:
        raise ValueError(reason)

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


def stage_graph(graph: ExecutionGraph, stage: PipelineStage) -> ExecutionGraph:
    """The part of a graph that one stage runs.

    Values from earlier stages are inputs, with the names of `received_values`, and values for later ones are outputs.
    """
    if stage.count == 1:
        return graph
    split = split_stages(graph, stage.count)
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


def _device_of(node: ExecutionNode, num_layers: int, num_stages: int, has_layers_begun: bool) -> int:
    if node.layer_id is not None:
        return stage_of_layer(node.layer_id, num_layers, num_stages)
    return num_stages - 1 if has_layers_begun else 0
