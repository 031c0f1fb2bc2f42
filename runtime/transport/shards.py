"""Part of the KV that one rank has, and the routes between the ranks of two workers."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.transport.rows import Rows, Span

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """Layers and key heads of a model that a rank has."""

    layers: range
    heads: range


def part_of(rank: int, tp: int, num_layers: int, num_heads: int) -> Part:
    """The part of a tensor-parallel rank: its share of the key heads; a copy of one if there are fewer than ranks."""
    first = rank * num_heads // tp
    return Part(range(num_layers), range(first, first + max(1, num_heads // tp)))


class Route(NamedTuple):
    """Heads that a source rank sends to a target rank, in the layers that both have."""

    source: int
    target: int
    layers: range
    heads: range


def routes_between(sources: Sequence[Part], targets: Sequence[Part]) -> list[Route]:
    """The routes by which every target rank gets each of its heads in each of its layers exactly once.

    Of source ranks with copies of a head the first one sends it.
    """
    found: list[Route] = []
    for target, wanted in enumerate(targets):
        sent: set[tuple[range, range]] = set()
        for source, part in enumerate(sources):
            layers, heads = _overlap(part.layers, wanted.layers), _overlap(part.heads, wanted.heads)
            if layers and heads and (layers, heads) not in sent:
                sent.add((layers, heads))
                found.append(Route(source, target, layers, heads))
    return found


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


@dataclass(frozen=True, slots=True)
class PoolShard:
    """The KV pool of a rank: per layer of `part` one tensor or two (keys, values), [blocks, block_size, heads, width].

    Layouts that store values as the leading part of keys have no tensors of values.
    """

    part: Part
    block_size: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor] = ()

    def span(self, start: int, num_tokens: int, blocks: Sequence[int]) -> Span:
        return Span(start, num_tokens, blocks, self.block_size)

    def caches(self, layer: int) -> Iterator[Tensor]:
        """The tensors of a layer, by its number in the model."""
        index = layer - self.part.layers.start
        yield self.keys[index]
        if self.values:
            yield self.values[index]

    def rows(self, layer: int, span: Span, heads: range) -> list[Rows]:
        """Keys and values of these heads of the model."""
        first = self.part.heads.start
        columns = slice(heads.start - first, heads.stop - first)
        return [Rows(cache, span, columns) for cache in self.caches(layer)]


class PoolShape(NamedTuple):
    """Sizes of a rank's pool: the tensors of keys and of values, their blocks, and the heads and widths of both."""

    num_layers: int
    num_blocks: int
    block_size: int
    keys: tuple[int, int]
    values: tuple[int, int] | None

    def sizes(self) -> list[tuple[int, int, int, int]]:
        """The sizes of all tensors, keys first, in the order in which they are in memory."""
        kinds = [self.keys, *([] if self.values is None else [self.values])]
        return [(self.num_blocks, self.block_size, *kind) for kind in kinds for _ in range(self.num_layers)]


def memory_bytes(shape: PoolShape, dtype: torch.dtype) -> int:
    """The bytes of the memory of a pool that several processes map."""
    return sum(_padded_bytes(sizes, dtype) for sizes in shape.sizes())


def map_pool(file: int, shape: PoolShape, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of keys and of values in the memory of this descriptor. Pages that are never used do not exist."""
    memory = torch.frombuffer(mmap.mmap(file, memory_bytes(shape, dtype)), dtype=torch.uint8)
    tensors, start = list[Tensor](), 0
    for sizes in shape.sizes():
        num_bytes = _num_bytes(sizes, dtype)
        tensors.append(memory[start : start + num_bytes].view(dtype).view(sizes))
        start += _padded_bytes(sizes, dtype)
    return tensors[: shape.num_layers], tensors[shape.num_layers :]


def _num_bytes(sizes: Sequence[int], dtype: torch.dtype) -> int:
    return int(torch.Size(sizes).numel()) * dtype.itemsize


def _padded_bytes(sizes: Sequence[int], dtype: torch.dtype) -> int:
    return -(-_num_bytes(sizes, dtype) // PAGE) * PAGE
