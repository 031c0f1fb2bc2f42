"""Inserts the nodes that stream the weights of layers from a file through staging buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sageLLM.generated.ops import WeightLoad
from sageLLM.generated.passes.schedule import WeightPrefetch
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.passes.order import reorder

FILE = "weights_file"
"""The graph input with the descriptor of the file."""


class StreamedLayer(NamedTuple):
    """The weights of a layer in the file: the first page, the size in bytes, and the staging buffer that they use."""

    page: int
    num_bytes: int
    buffer: int


def io_stream(graph: ExecutionGraph) -> int:
    """The stream of the nodes that move data between tiers: after all others, unless the graph has such nodes."""
    streams = {node.stream_id for node in graph.nodes.values() if node.metadata.get("tier", "device") != "device"}
    return min(streams, default=1 + max((node.stream_id for node in graph.nodes.values()), default=0))


def staging_name(layer: int) -> str:
    """The graph input for the part of a staging buffer that a layer's weights fill."""
    return f"layers.{layer}.staging"


def stream_weights(
    graph: ExecutionGraph, layers: Mapping[int, StreamedLayer], *, prefetch_layers: int, budget_bytes: int
) -> ExecutionGraph:
    """A copy of a kernel graph with a WEIGHT_LOAD for each streamed layer, on the io stream.

    The readers of a layer's weights wait for its load, and a load waits for the readers of the weights that were in the
    same buffer. Loads are listed, and by `weight_prefetch` issued, `prefetch_layers` layers before their layer.
    """
    result = graph.copy()
    order = result.topological_sort()
    readers = _readers(graph, order, layers)
    stream = io_stream(graph)
    loads = {layer: _load(result, layer, layers[layer], stream) for layer in readers}
    for layer, load in loads.items():  # a pipeline stage is a device with this number
        load.device_id = readers[layer][0].device_id
    previous: dict[int, int] = {}
    for layer, load in loads.items():
        if (last := previous.get(layers[layer].buffer)) is not None:
            load.dependencies |= {node.node_id for node in readers[last]}
        previous[layers[layer].buffer] = layer
        for node in readers[layer]:
            node.dependencies.add(load.node_id)
    reorder(result, issue_early(order, loads, prefetch_layers))
    result.reindex()
    WeightPrefetch(budget_bytes, prefetch_layers).transform(result)
    return result


def _readers(
    graph: ExecutionGraph, order: Sequence[ExecutionNode], layers: Mapping[int, StreamedLayer]
) -> dict[int, list[ExecutionNode]]:
    """The nodes that read the weights of each streamed layer, in the order of the layers."""
    layer_of = {f"layers.{layer}.": layer for layer in layers}
    found: dict[int, list[ExecutionNode]] = {}
    for node in order:
        for name in {".".join(ref.name.split(".")[:2]) + "." for ref in node.inputs if ref.name in graph.weights}:
            if name in layer_of:
                found.setdefault(layer_of[name], []).append(node)
    return dict(sorted(found.items()))


def _load(graph: ExecutionGraph, layer: int, streamed: StreamedLayer, stream: int) -> ExecutionNode:
    file = graph.inputs.setdefault(FILE, TensorRef(FILE, (1,), "i64"))
    name = staging_name(layer)
    staging = graph.inputs.setdefault(name, TensorRef(name, (streamed.num_bytes,), "i8"))
    loaded = TensorRef(f"L{layer}.weights", staging.shape, staging.dtype)
    load = WeightLoad(loaded.name, WeightLoad.kind, [file, staging], [loaded], attrs={"page": streamed.page})
    load.layer_id, load.stream_id, load.metadata = layer, stream, {"tier": "disk"}
    return load


def issue_early(
    nodes: Sequence[ExecutionNode], loads: Mapping[int, ExecutionNode], prefetch_layers: int
) -> list[ExecutionNode]:
    """The nodes with each load before the layer that is `prefetch_layers` before its own, or as soon as its
    dependencies allow."""
    waiting = dict(loads)
    order: list[ExecutionNode] = []
    done: set[str] = set()
    for node in nodes:
        for layer, load in list(waiting.items()):
            is_near = node.layer_id is not None and layer <= node.layer_id + prefetch_layers
            if (is_near or load.node_id in node.dependencies) and load.dependencies <= done:
                order.append(waiting.pop(layer))
                done.add(load.node_id)
        order.append(node)
        done.add(node.node_id)
    return [*order, *waiting.values()]
