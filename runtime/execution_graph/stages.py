"""Splits a block graph over pipeline stages: each layer gets a device, and values cross borders by send and receive."""

from __future__ import annotations

from dataclasses import replace

from sageLLM.generated.ops import Recv, Send
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode


def stage_of_layer(layer: int, num_layers: int, num_stages: int) -> int:
    """The stage that runs a layer; stages get equal shares of the layers, up to one."""
    return layer * num_stages // num_layers


def split_stages(graph: ExecutionGraph, num_stages: int) -> ExecutionGraph:
    """The same graph with the stage as device of every node, and a COMM_SEND and COMM_RECV where a value crosses.

    What comes before the layers runs on the first stage, what comes after them on the last. The send hands its value
    on to the receive, so the graph shows the transfer as one chain; each rank runs its own half of it. Raises
    ValueError if there are more stages than layers.
    """
    if num_stages > graph.num_layers:
        raise ValueError(
            f"pipeline_parallel_size={num_stages} is more than the {graph.num_layers} layers of {graph.graph_id!r}; "
            "use at most one stage per layer"
        )
    return _Splitter(graph, num_stages).run()


class _Splitter:
    """Rewrites the nodes in order, noting which value stands for an old one on which device."""

    def __init__(self, graph: ExecutionGraph, num_stages: int) -> None:
        self.source, self.num_stages = graph, num_stages
        self.result = replace(
            graph,
            nodes={},
            prefill_nodes=set(),
            decode_nodes=set(),
            comm_nodes=set(),
            inputs={},
            weights={},
            outputs=[],
        )
        self.values: dict[tuple[str, int], TensorRef] = {}
        self.home: dict[str, int] = {}

    def run(self) -> ExecutionGraph:
        device = 0
        for node in self.source.topological_sort():
            device = self._device(node, device)
            self._place(node, device)
        self.result.outputs = [self.values[ref.name, self.home[ref.name]] for ref in self.source.outputs]
        return self.result

    def _device(self, node: ExecutionNode, current: int) -> int:
        if node.layer_id is not None:
            return stage_of_layer(node.layer_id, self.source.num_layers, self.num_stages)
        has_begun = any(other.layer_id is not None for other in self.result.nodes.values())
        return self.num_stages - 1 if has_begun else current

    def _place(self, node: ExecutionNode, device: int) -> None:
        placed = node.copy()
        placed.device_id = device
        placed.inputs = [self._on(ref, device, node.layer_id) for ref in node.inputs]
        placed.outputs = [replace(ref, device_id=device) for ref in node.outputs]
        placed.dependencies -= {w.node_id for ref in node.inputs if (w := self.source.producer(ref)) is not None}
        for ref in placed.outputs:
            self.values[ref.name, device] = ref
            self.home[ref.name] = device
        self.result.add_node(placed)

    def _on(self, ref: TensorRef, device: int, layer: int | None) -> TensorRef:
        """The value as the device has it: declared there, made there, or received."""
        if (ref.name, device) in self.values:
            return self.values[ref.name, device]
        if ref.name not in self.home:
            return self._declare(ref, device)
        return self._transfer(ref, device, layer)

    def _declare(self, ref: TensorRef, device: int) -> TensorRef:
        """An input or weight; one that several devices read is declared on the first of them."""
        table, old = (self.result.weights, self.source.weights)
        if ref.name not in old:
            table = self.result.inputs
        return table.setdefault(ref.name, replace(ref, device_id=device))

    def _transfer(self, ref: TensorRef, device: int, layer: int | None) -> TensorRef:
        source = self.home[ref.name]
        writer = self.source.producer(ref)
        first = replace(self.values[ref.name, source], name=f"{ref.name}.to{device}")
        second = replace(first, name=f"{ref.name}.on{device}", device_id=device)
        at = writer.layer_id if writer else None
        self._add(Send, self.values[ref.name, source], first, source, device, at)
        self._add(Recv, first, second, device, source, layer)
        self.values[ref.name, device] = second
        return second

    def _add(self, kind: type[OpNode], x: TensorRef, y: TensorRef, device: int, peer: int, layer: int | None) -> None:
        node = kind(y.name, kind.kind, [x], [y], device_id=device, layer_id=layer, attrs={"peer": peer, "group": "pp"})
        self.result.add_node(node)
