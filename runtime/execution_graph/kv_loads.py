"""Inserts the nodes that load the KV of running requests from the tier below the device, and write new KV back."""

from __future__ import annotations

from sageLLM.generated.ops import KvCopy, OpType
from sageLLM.generated.passes.schedule import KvPrefetch
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.order import reorder
from sageLLM.runtime.execution_graph.weight_loads import io_stream, issue_early

NUM_BUFFERS = 2
"""Staging buffers: the caches of layers l and l + NUM_BUFFERS share one."""
LOAD_FROM, LOAD_INTO, STORE_FROM, STORE_INTO = BLOCK_INPUTS = ("load_from", "load_into", "store_from", "store_into")
"""The graph inputs with the blocks to load, in the lower pool and in the staging area, and those to write back."""
LOWER_PAGES, NUM_LOADED, NUM_STORED = dims("TPG ML MS")


def lower_name(cache: str) -> str:
    """The graph input for the cache of the lower pool."""
    return f"lower.{cache}"


def load_kv(graph: ExecutionGraph, tier: str, budget_bytes: int) -> ExecutionGraph:
    """A copy of a kernel graph in which each layer loads blocks from the lower pool and writes blocks back.

    A KV_LOAD per layer copies the blocks into the staging area at the end of the layer's cache, and a KV_MIGRATE copies
    those with new tokens back. Both are on the io stream. The load of a layer waits until the layer that had the
    staging buffer before has read it and written it back; `kv_prefetch` issues it a layer ahead.
    """
    result = graph.copy()
    result.graph_id = f"{graph.graph_id}_kv_{tier}"
    order, stream = result.topological_sort(), io_stream(graph)
    blocks = _block_inputs(result)
    loads: dict[int, ExecutionNode] = {}
    stores: dict[str, ExecutionNode] = {}  # by the node after which they are listed
    users: dict[int, set[str]] = {}
    for layer in _layers(result):
        caches = [result.inputs[f"layers.{layer}.{name}"] for name in ("k_cache", "v_cache")]
        lower = [_lower_input(result, ref) for ref in caches]
        loaded = _named(layer, "loaded", caches)
        load = KvCopy(loaded[0].name, OpType.KV_LOAD, [*lower, *caches, *blocks[:2]], loaded)
        found = _redirect(order, {ref.name: new for ref, new in zip(caches, loaded, strict=True)})
        written = [_last_written(found, ref) for ref in loaded]
        stored = _named(layer, "stored", lower)
        store = KvCopy(stored[0].name, OpType.KV_MIGRATE, [*written, *lower, *blocks[2:]], stored)
        writers = [node for node in found if not {ref.name for ref in written}.isdisjoint(r.name for r in node.outputs)]
        store.dependencies = {load.node_id, *(node.node_id for node in writers)}
        load.dependencies = set(users.get(layer - NUM_BUFFERS, ()))
        for node in found:
            node.dependencies.add(load.node_id)
        for transfer in (load, store):
            _place(transfer, layer, stream, tier)
            transfer.device_id = found[0].device_id  # a pipeline stage is a device with this number
        users[layer] = {store.node_id, *(node.node_id for node in found)}
        loads[layer], stores[(writers or found)[-1].node_id] = load, store
    with_stores = [one for node in order for one in (node, stores.get(node.node_id)) if one is not None]
    reorder(result, issue_early(with_stores, loads, KvPrefetch.prefetch_layers))
    result.reindex()
    KvPrefetch(budget_bytes).transform(result)
    return result


def _named(layer: int, name: str, refs: list[TensorRef]) -> list[TensorRef]:
    """New values of these types, for keys and values."""
    return [
        TensorRef(f"L{layer}.{kind}_{name}", ref.shape, ref.dtype, ref.device_id)
        for kind, ref in zip("kv", refs, strict=True)
    ]


def _place(node: ExecutionNode, layer: int, stream: int, tier: str) -> None:
    node.layer_id, node.stream_id, node.metadata = layer, stream, {"tier": tier}


def _layers(graph: ExecutionGraph) -> list[int]:
    """The layers with a cache, in order."""
    names = (name.split(".") for name in graph.inputs)
    return sorted(int(parts[1]) for parts in names if parts[0] == "layers" and parts[-1] == "k_cache")


def _block_inputs(graph: ExecutionGraph) -> list[TensorRef]:
    sizes = (NUM_LOADED, NUM_LOADED, NUM_STORED, NUM_STORED)
    refs = [TensorRef(name, (size,), "i32") for name, size in zip(BLOCK_INPUTS, sizes, strict=True)]
    graph.inputs |= {ref.name: ref for ref in refs}
    return refs


def _lower_input(graph: ExecutionGraph, cache: TensorRef) -> TensorRef:
    lower = TensorRef(lower_name(cache.name), (LOWER_PAGES, *cache.shape[1:]), cache.dtype)
    graph.inputs[lower.name] = lower
    return lower


def _redirect(order: list[ExecutionNode], loaded: dict[str, TensorRef]) -> list[ExecutionNode]:
    """Lets the readers of these caches read the loaded ones; returns them and the readers of what they write there."""
    names = {*loaded, *(ref.name for ref in loaded.values())}
    found = []
    for node in order:
        if not names.isdisjoint(ref.name for ref in node.inputs):
            node.inputs = [loaded.get(ref.name, ref) for ref in node.inputs]
            names |= _in_place(node, names)
            found.append(node)
    return found


def _in_place(node: ExecutionNode, names: set[str]) -> set[str]:
    """The outputs of a node in the memory of one of these values."""
    if not isinstance(node, OpNode):
        return set()
    sources = {output: node.optional_input(operand) for output, operand in node.inplace.items()}
    return {node.output(output).name for output, ref in sources.items() if ref is not None and ref.name in names}


def _last_written(nodes: list[ExecutionNode], ref: TensorRef) -> TensorRef:
    """The last value in the memory of a cache."""
    for node in nodes:
        if isinstance(node, OpNode):
            for output, operand in node.inplace.items():
                source = node.optional_input(operand)
                if source is not None and source.name == ref.name:
                    ref = node.output(output)
    return ref
