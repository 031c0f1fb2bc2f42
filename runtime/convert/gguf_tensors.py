"""The tensors of a GGUF file for the weights of a checkpoint: names, shapes, types, and the order of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.convert.source import Source
from sageLLM.runtime.core.model.checkpoint import ignore_patterns, is_ignored
from sageLLM.runtime.core.model.formats import Format
from sageLLM.runtime.core.model.gguf import Architecture
from sageLLM.runtime.core.model.gguf_recipe import Recipe
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.gguf_architectures import name_of, stored_name
from sageLLM.runtime.loader.gguf_checkpoint import is_norm, permuted_heads

ROUTERS = "ffn_gate_inp"
"""The beginning of the names of routers, which stay float32: a small error there selects another expert."""
EMBEDDING, HEAD = "token_embd", "output"


@dataclass(slots=True)
class Planned:
    """A tensor of the file: its shape, its format, and the weights of the checkpoint by their experts, None without.

    Rows are permuted in `num_heads` heads if it is not 0; `offset` is added to the values.
    """

    shape: tuple[int, ...]
    format: Format
    num_heads: int = 0
    offset: float = 0.0
    sources: dict[int | None, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) // int(self.format.sizes["B"]) * (self.format.block_bytes or 0)

    def moved(self, weight: Tensor) -> Tensor:
        """The weight with its rows in the order of the file."""
        if not self.num_heads:
            return weight
        return weight.reshape(self.num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class Types:
    """The formats of a file: of matrices by the recipe, and of vectors and routers."""

    recipe: Recipe
    formats: Mapping[str, Format]
    plain: Format
    by_dtype: Mapping[torch.dtype, Format]
    """For matrices with rows of incomplete blocks."""

    def of(self, stem: str, layer: int, num_layers: int, shape: tuple[int, ...], dtype: torch.dtype) -> Format:
        if len(shape) < 2 or stem.startswith(ROUTERS):
            return self.plain
        name: str | None = self.recipe.format_of(stem, layer, num_layers)
        while name is not None:
            found = self.formats[name]
            if shape[-1] % int(found.sizes["B"]) == 0:
                return found
            name = found.written.incomplete if found.written is not None else None
        return self.by_dtype.get(dtype, self.plain)


def planned_tensors(
    source: Source, architecture: Architecture, metadata: Mapping[str, Any], types: Types
) -> dict[str, Planned]:
    """The tensors by name. Raises CheckpointError for a weight that the architecture does not have."""
    found: dict[str, Planned] = {}
    kind, weights = metadata["general.architecture"], list(_weights(source))
    num_layers = int(metadata[f"{kind}.block_count"])
    is_tied = all(stored_name(weight, architecture) != (f"{HEAD}.weight", None) for weight in weights)
    for weight in weights:
        place = stored_name(weight, architecture)
        name = name_of(place[0], architecture) if place is not None else None
        if place is None or name is None:
            raise CheckpointError(f"{source.folder}: expected tensors of GGUF files of {kind}, got {quoted(weight)}")
        stored, expert = place
        info = source.checkpoint.info(weight)
        shape = info.shape[1:] if name.stem in architecture.rows else info.shape
        if stored not in found:
            heads = permuted_heads(name, metadata) if architecture.is_permuted else 0
            offset = 1.0 if architecture.adds_one and is_norm(name) else 0.0
            stem = HEAD if is_tied and name.stem == EMBEDDING else name.stem
            format = types.of(stem, layer_of(stored), num_layers, shape, info.dtype)
            found[stored] = Planned(shape, format, heads, offset)
        found[stored].sources[expert] = weight
    for stored, one in found.items():
        if None not in one.sources:
            if sorted(map(int, filter(None, one.sources))) != list(range(1, len(one.sources))):
                raise CheckpointError(f"{source.folder}: experts of {quoted(stored)} are missing")
            one.shape = (len(one.sources), *one.shape)
    return found


def layer_of(stored: str) -> int:
    """The layer of a tensor, 0 for one outside of the layers."""
    parts = stored.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0


def _weights(source: Source) -> Iterator[str]:
    """The weights that the layout reads, each once: those that are tied to others are absent in files."""
    patterns = ignore_patterns(source.layout, source.sizes)
    specs = list(source.layout.weights(source.sizes))
    read = {part.name for spec in specs if spec.tied_to is None for part in spec.parts}
    tied = {part.name for spec in specs if spec.tied_to is not None for part in spec.parts} - read
    return (name for name in source.checkpoint if name not in tied and not is_ignored(name, patterns))
