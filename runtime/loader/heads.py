"""Checkpoints without a head: embedding models often lack the projection to the vocabulary or the pooler."""

from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Any

from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.weights import WeightSpec
from sageLLM.runtime.execution_graph.embedding import build_embedding_graph
from sageLLM.runtime.execution_graph.expand import expand


def absent_head(layout: ModelLayout, config: Any, tensors: Set[str]) -> tuple[str, ...]:
    """The weights of the head, if the checkpoint has none of their tensors; else an empty tuple.

    The head is every weight that the hidden states do not depend on. A checkpoint with a part of it is not accepted as
    headless, so that a missing tensor is reported.
    """
    if layout.hidden is None:
        return ()
    specs = list(layout.weights(config))
    if all(part.name in tensors for spec in specs if spec.tied_to is None for part in spec.parts):
        return ()
    blocks = build_embedding_graph(layout, config, "none", normalize=False, dtype="f32")
    needed = expand(blocks, layout, config).weights
    head = [spec for spec in specs if spec.name not in needed and spec.tied_to is None]
    has_some = any(part.name in tensors for spec in head for part in spec.parts)
    return () if has_some else tuple(spec.name for spec in head)


def without_weights(layout: ModelLayout, names: tuple[str, ...]) -> ModelLayout:
    """The layout without these weights of the head."""

    def weights(config: Any) -> Iterator[WeightSpec]:
        return (spec for spec in layout.weights(config) if spec.name not in names)

    return replace(layout, weights=weights, pooled=None)
