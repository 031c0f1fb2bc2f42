"""Weights of a layout: the checkpoint tensors that fill them, reshaped and sliced, and the share of each rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Literal

from sageLLM.runtime.core.errors import ConfigError

MAX_STACKED = 2**16
VOCAB_BLOCK = 64
"""A padded vocabulary is a multiple of this size, as in vLLM and SGLang."""


@dataclass(frozen=True, slots=True)
class View:
    """A view of a tensor: `reshape(axes)[take].permute(order).reshape(size)` fills the weight.

    `take` lists (axis, start, stop); an axis without an entry is kept whole. `order` is the permutation of the axes.
    """

    axes: tuple[int, ...]
    order: tuple[int, ...]
    size: tuple[int, ...]
    take: tuple[tuple[int, int, int], ...] = ()

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """For each axis, the range (start, stop) that is read."""
        taken = {axis: (start, stop) for axis, start, stop in self.take}
        return tuple(taken.get(axis, (0, size)) for axis, size in enumerate(self.axes))


@dataclass(frozen=True, slots=True)
class Part:
    """A checkpoint tensor of `shape`, and the region of the weight that it fills, which starts at `at`.

    Dims that `at` does not list start at 0. A tensor with fewer dims than the weight fills one index of the first dims.
    With `is_either`, checkpoints have the tensor in `shape`, or with its last two dims swapped, which is the weight.
    """

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...] = ()
    view: View | None = None
    is_either: bool = False

    def region(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) along each of the weight's `rank` dims."""
        size = self.view.size if self.view is not None else self.shape
        size = (1,) * (rank - len(size)) + size
        starts = self.at + (0,) * (rank - len(self.at))
        return tuple((start, start + length) for start, length in zip(starts, size, strict=True))


@dataclass(frozen=True, slots=True)
class Shard:
    """Sharding of a weight under tensor parallelism.

    "rows" and "vocab" divide `dim` over the ranks, and "vocab" pads it with zeros if they do not divide it; "first"
    keeps the weight on rank 0 and zeros on the others, for a bias that is added before a sum over ranks. `then` is the
    collective that completes the result. `segments` are the sizes along `dim` that are divided separately, such as q,
    k and v; empty for a single segment. `key_heads` are the numbers of key heads in the segments, 0 in others: if there
    are fewer than ranks, each rank has a copy of one. `experts` marks a weight with a slice per expert, along dim 0,
    which expert parallelism divides instead of `dim`.
    """

    dim: int = 0
    kind: Literal["rows", "vocab", "first"] = "rows"
    then: Literal["all_reduce", "all_gather"] | None = None
    segments: tuple[int, ...] = ()
    key_heads: tuple[int, ...] = ()
    experts: bool = False


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """An unsharded weight of a graph, and the checkpoint tensors that fill it, each element once.

    A weight with `tied_to` shares the memory of that weight.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    shard: Shard | None = None
    tied_to: str | None = None

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def by_experts(spec: WeightSpec) -> WeightSpec:
    """The weight under expert parallelism: each rank has all of its experts."""
    return replace(spec, shard=Shard()) if spec.shard is not None and spec.shard.experts else spec


def stacked(key: str, count: int) -> range:
    """The indices of a stack; ConfigError for more than MAX_STACKED, since a config may claim any number."""
    if count > MAX_STACKED:
        raise ConfigError(f"{key}: expected at most {MAX_STACKED} stacked tensors, got {count}")
    return range(count)


def padded_vocab(size: int, tp: int) -> int:
    """The rows of a token table over all ranks: as many as tokens, or padded to a multiple of 64 that `tp` divides."""
    block = lcm(VOCAB_BLOCK, tp)
    return size if size % tp == 0 else -(-size // block) * block


def vocab_share(size: int, tp: int) -> int:
    """The rows of a token table on each of `tp` ranks; those after the last token are padding."""
    return padded_vocab(size, tp) // tp


def share_runs(spec: WeightSpec, rank: int, tp: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of each run along the divided dim on rank `rank` of `tp`, in order.

    A weight that is not divided is one run over all of dim 0. A run of tokens is shorter than the share if the share
    ends with padding. ConfigError if `tp` does not divide a segment.
    """
    shard = spec.shard
    if shard is None or shard.kind == "first" or tp == 1:
        dim = shard.dim if shard is not None else 0
        return ((0, spec.shape[dim] if spec.shape else 1),)
    if shard.kind == "vocab":
        num_tokens = spec.shape[shard.dim]
        share = vocab_share(num_tokens, tp)
        start = min(rank * share, num_tokens)
        return ((start, min(share, num_tokens - start)),)
    runs: list[tuple[int, int]] = []
    start = 0
    segments = shard.segments or (spec.shape[shard.dim],)
    for segment, heads in zip(segments, shard.key_heads or (0,) * len(segments), strict=True):
        if 0 < heads < tp and tp % heads == 0:  # consecutive ranks share a head, as their query heads do
            runs.append((start + rank * heads // tp * (segment // heads), segment // heads))
            start += segment
            continue
        if segment % tp:
            raise ConfigError(f"tensor_parallel_size={tp} does not divide {segment} rows of {spec.name}")
        size = segment // tp
        runs.append((start + rank * size, size))
        start += segment
    return tuple(runs)


def share_shape(spec: WeightSpec, tp: int) -> tuple[int, ...]:
    """The shape of a rank's share, equal on all ranks."""
    if not spec.shape:
        return ()
    dim = spec.shard.dim if spec.shard is not None else 0
    if spec.shard is not None and spec.shard.kind == "vocab":
        size = vocab_share(spec.shape[dim], tp)
    else:
        size = sum(size for _, size in share_runs(spec, 0, tp))
    return (*spec.shape[:dim], size, *spec.shape[dim + 1 :])
