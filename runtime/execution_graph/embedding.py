"""Graph of an embedding step: a layout's program up to its hidden states, pooled and normalised."""

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
"""The vector of a sequence: the layout's own, the first, last or mean hidden state, or every hidden state."""

POOLINGS: tuple[Pooling, ...] = ("model", "first", "last", "mean", "none")
_POOL: Mapping[str, Callable[..., TensorRef]] = {
    "first": ops.pool_first,
    "last": ops.pool_last,
    "mean": ops.pool_mean,
}


def poolings_of(layout: ModelLayout) -> tuple[Pooling, ...]:
    """The poolings that the layout supports."""
    return tuple(name for name in POOLINGS if (layout.pooled if name == "model" else layout.hidden) is not None)


def build_embedding_graph(
    layout: ModelLayout, config: Any, pooling: Pooling, *, normalize: bool, dtype: str
) -> ExecutionGraph:
    """The block graph of one step over whole prompts. Its output has a row per prompt, or per token for "none".

    Raises ValueError for a pooling that the layout does not support.
    """
    if pooling not in poolings_of(layout):
        raise ValueError(
            f"layout '{layout.name}': expected one of the poolings {', '.join(poolings_of(layout))}, got '{pooling}'"
        )
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
    """The value of that name; the generator checks that `hidden` names a value that is produced once."""
    producer = graph.producer(name)
    assert producer is not None, "`hidden` must name a value of the program"
    return next(ref for ref in producer.outputs if ref.name == name)


def _needed_for(graph: ExecutionGraph) -> ExecutionGraph:
    """The graph without the nodes that its outputs do not depend on, such as the projection to the vocabulary."""
    needed: set[str] = set()
    pending = [producer for ref in graph.outputs if (producer := graph.producer(ref)) is not None]
    while pending:
        node = pending.pop()
        if node.node_id not in needed:
            needed.add(node.node_id)
            pending += [producer for ref in node.inputs if (producer := graph.producer(ref)) is not None]
    stores = {node_id for node_id, node in graph.nodes.items() if not node.outputs}
    kept = graph.get_subgraph(needed | stores)
    kept.outputs = graph.outputs
    return kept
