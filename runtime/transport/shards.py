"""Part of the KV that one rank has, and the routes between the ranks of two workers."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

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

    def caches(self, layer: int) -> Iterator[Tensor]:
        """The tensors of a layer, by its number in the model."""
        index = layer - self.part.layers.start
        yield self.keys[index]
        if self.values:
            yield self.values[index]

    def read(self, cache: Tensor, span: Span, heads: range) -> Tensor:
        """The tokens of a span, contiguous, [tokens, heads, width]; a view if the blocks follow each other."""
        first = span.start % self.block_size
        blocks = cache.index_select(0, span.index) if span.run is None else cache[span.run]
        rows = blocks.flatten(0, 1)[first : first + span.num_tokens]
        return rows if heads == self.part.heads else rows[:, self._columns(heads)].contiguous()

    def write(self, cache: Tensor, span: Span, heads: range, rows: Tensor) -> None:
        """Writes rows [tokens, heads, width] to the tokens of a span."""
        first, size = span.start % self.block_size, self.block_size
        if span.run is not None:
            cache[span.run].flatten(0, 1)[first : first + span.num_tokens, self._columns(heads)] = rows
            return
        if heads == self.part.heads and first == 0 and span.num_tokens % size == 0:
            cache.index_copy_(0, span.index, rows.view(len(span.index), size, *rows.shape[1:]))
            return
        slots = (span.index[:, None] * size + torch.arange(size)).flatten()[first : first + span.num_tokens]
        cache.flatten(0, 1)[:, self._columns(heads)].index_copy_(0, slots, rows)

    def _columns(self, heads: range) -> slice:
        first = self.part.heads.start
        return slice(heads.start - first, heads.stop - first)


class Span:
    """Tokens `start .. start + num_tokens - 1` of a sequence, in `blocks`; the first block holds token `start`.

    `run` are the blocks if their numbers follow each other, as they mostly do in a pool that is not full.
    """

    __slots__ = ("index", "num_tokens", "run", "start")

    def __init__(self, start: int, num_tokens: int, blocks: Sequence[int]) -> None:
        self.start, self.num_tokens = start, num_tokens
        self.index = torch.tensor(blocks, dtype=torch.int64)
        is_run = all(b == a + 1 for a, b in pairwise(blocks))
        self.run = slice(blocks[0], blocks[-1] + 1) if blocks and is_run else None


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
