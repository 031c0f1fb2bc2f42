"""The graph of a step that gives embeddings: a layout's program up to its hidden states, pooled and normalised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from sageLLM.generated import ops
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.core.model.layout import ModelLayout

Pooling: TypeAlias = Literal["model", "first", "last", "mean", "none"]
"""Which vector stands for a sequence: the layout's own, its first, last or mean hidden state, or each of them."""

POOLINGS: tuple[Pooling, ...] = ("model", "first", "last", "mean", "none")
_POOL: Mapping[str, Callable[..., TensorRef]] = {
    "first": ops.pool_first,
    "last": ops.pool_last,
    "mean": ops.pool_mean,
}


def poolings_of(layout: ModelLayout) -> tuple[Pooling, ...]:
    """The poolings that the layout has a value for."""
    return tuple(name for name in POOLINGS if (layout.pooled if name == "model" else layout.hidden) is not None)


def build_embedding_graph(
    layout: ModelLayout, config: Any, pooling: Pooling, *, normalize: bool, dtype: str
) -> ExecutionGraph:
    """The block graph of one step over whole prompts. Its output has a row per prompt, or per token for "none".

    Raises ValueError for a pooling that the layout has no value for.
    """
    if pooling not in poolings_of(layout):
        raise ValueError(f"layout '{layout.name}' has no pooling '{pooling}'; it has {', '.join(poolings_of(layout))}")
    writer = GraphWriter(f"{layout.name}_embed", level="block", stage="prefill", dtype=dtype)
    returned = dict(zip(layout.returns, layout.program(writer, config, "prefill"), strict=True))
    name = str(layout.pooled if pooling == "model" else layout.hidden)
    value = returned[name] if name in returned else _named(writer.graph, name)
    if pooling in _POOL:
        (sequences,) = dims("B")
        value = _POOL[pooling](writer, value, writer.input("q_start", "i32", sequences + 1), name="pooled")
    if normalize:
        value = ops.l2_norm(writer, value, name="embedding")
    graph = _needed_for(writer.finish([value]))
    graph.model_config = config
    return graph


def _named(graph: ExecutionGraph, name: str) -> TensorRef:
    """The value of that name; a layout marks one that is made once, so that its name is its own."""
    writer = graph.producer(name)
    assert writer is not None, "the generator has checked what `hidden` names"
    return next(ref for ref in writer.outputs if ref.name == name)


def _needed_for(graph: ExecutionGraph) -> ExecutionGraph:
    """The graph without the nodes that its outputs do not need, such as the projection to the vocabulary."""
    needed: set[str] = set()
    wanted = [writer for ref in graph.outputs if (writer := graph.producer(ref)) is not None]
    while wanted:
        node = wanted.pop()
        if node.node_id not in needed:
            needed.add(node.node_id)
            wanted += [writer for ref in node.inputs if (writer := graph.producer(ref)) is not None]
    stores = {node_id for node_id, node in graph.nodes.items() if not node.outputs}
    kept = graph.get_subgraph(needed | stores)
    kept.outputs = graph.outputs
    return kept
