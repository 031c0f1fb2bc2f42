"""Loads a checkpoint's tensors into the layout's weights: fused, stacked, split or tied as the layout declares.

Each element is copied once, from the mapped file straight to its final position. What was read of a file stays in
memory while the file is mapped, so it is mapped again after MAPPED_BYTES: the peak memory is one copy of the weights.
"""

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from sageLLM.runtime.core.model.weights import Part, View, WeightSpec, share_runs, share_shape
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight
from sageLLM.runtime.kernels.cpu.packing import release_free_memory
from sageLLM.runtime.loader.coded_weights import load_codes, with_columns
from sageLLM.runtime.loader.safetensors_reader import Checkpoint

MAPPED_BYTES = 32 << 20


Loaded = TypeVar("Loaded", Tensor, Tensor | CodedWeight)


def load_weights(
    specs: Iterable[WeightSpec],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rank: int = 0,
    tp: int = 1,
) -> dict[str, Tensor]:
    """The weights by their names in graphs, or the shares of rank `rank` of `tp`, of which only the slices are read.

    `check_checkpoint` must have passed before: shapes are not checked here.
    """
    return _load_each(specs, checkpoint, lambda spec: _load(spec, checkpoint, dtype, device, rank, tp))


def load_coded_weights(
    specs: Iterable[WeightSpec],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rank: int = 0,
    tp: int = 1,
    dequantized: MutableMapping[str, str],
    activations: str | None = None,
) -> dict[str, Tensor | CodedWeight]:
    """As `load_weights`, with quantised weights as codes on the CPU; integers are multiplied with `activations`.

    `dequantized` receives the names of quantised weights that cannot stay codes, with the reasons.
    """

    def load(spec: WeightSpec) -> Tensor | CodedWeight:
        found = load_codes(spec, checkpoint, dtype, partial(_fill_columns, spec, rank, tp), rank, tp)
        if isinstance(found, CodedWeight):
            return replace(found, activations=activations) if FORMS[found.form].has_integers else found
        if found is not None:
            dequantized[spec.name] = found
        if prod(share_shape(spec, tp)) * dtype.itemsize >= MAPPED_BYTES:
            release_free_memory()  # that of intermediate results of codes, next to which a large weight is the peak
        return _load(spec, checkpoint, dtype, device, rank, tp)

    return _load_each(specs, checkpoint, load)


def _load_each(
    specs: Iterable[WeightSpec], checkpoint: Checkpoint, load: Callable[[WeightSpec], Loaded]
) -> dict[str, Loaded]:
    """Loads the weights one after another; tied ones share their memory."""
    weights: dict[str, Loaded] = {}
    ties: list[WeightSpec] = []
    num_mapped = 0
    for spec in specs:
        if spec.tied_to is not None:
            ties.append(spec)
            continue
        weights[spec.name] = load(spec)
        num_mapped += weights[spec.name].nbytes
        if num_mapped >= MAPPED_BYTES:
            checkpoint.close()
            num_mapped = 0
    return weights | {spec.name: weights[str(spec.tied_to)] for spec in ties}


def have_equal_values(checkpoint: Checkpoint, dtype: torch.dtype, one: WeightSpec, other: WeightSpec) -> bool:
    """Whether two weights of the checkpoint are equal when loaded as `dtype`, part by part."""
    if len(one.parts) != len(other.parts) or any(a.view != b.view for a, b in zip(one.parts, other.parts, strict=True)):
        return False
    if not all(part.name in checkpoint for part in (*one.parts, *other.parts)):
        return True  # one is incomplete; `check_checkpoint` reports its missing tensors
    pairs = ((checkpoint.read(a.name), checkpoint.read(b.name)) for a, b in zip(one.parts, other.parts, strict=True))
    return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in pairs)


def rank_shard(spec: WeightSpec, weight: Tensor, rank: int, tp: int) -> Tensor:
    """The shard of a whole weight on rank `rank` of `tp`, with zeros as padding of a token table.

    Raises ConfigError if a weight of another kind does not divide evenly.
    """
    if spec.shard is None or tp == 1:
        return weight
    if spec.shard.kind == "first":
        return weight if rank == 0 else torch.zeros_like(weight)
    runs = [weight.narrow(spec.shard.dim, start, size) for start, size in share_runs(spec, rank, tp)]
    held = torch.cat(runs, spec.shard.dim)
    share = weight.new_zeros(share_shape(spec, tp))
    share.narrow(spec.shard.dim, 0, held.shape[spec.shard.dim]).copy_(held)
    return share


def _load(
    spec: WeightSpec, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, rank: int, tp: int
) -> Tensor:
    # One part at a time, converted by copy_: neither the whole checkpoint nor a second copy in its dtype is in memory.
    is_padded = spec.shard is not None and spec.shard.kind == "vocab"
    weight = (torch.zeros if is_padded else torch.empty)(share_shape(spec, tp), dtype=dtype, device=device)
    if spec.shard is not None and spec.shard.kind == "first" and rank:
        return weight.zero_()
    for part in spec.parts:
        _fill(spec, rank, tp, weight, part, checkpoint.read(part.name, dtype=dtype))
    return weight


def _fill(spec: WeightSpec, rank: int, tp: int, weight: Tensor, part: Part, source: Tensor) -> None:
    """Copies a part to its region of the weight, or of the share of a rank."""
    region = part.region(len(spec.shape))
    source = source if part.view is None else _apply(part.view, source)
    if tp == 1 or spec.shard is None or spec.shard.kind == "first":
        weight[tuple(slice(start, stop) for start, stop in region)].copy_(source)
    else:
        _copy_runs(weight, source, region, spec.shard.dim, share_runs(spec, rank, tp))


def _fill_columns(spec: WeightSpec, rank: int, tp: int, weight: Tensor, part: Part, source: Tensor, width: int) -> None:
    """As `_fill`, of `width` columns that belong to the inputs of the share."""
    is_cut = spec.shard is not None and spec.shard.dim == len(spec.shape) - 1
    _fill(spec, rank, 1 if is_cut else tp, weight, with_columns(part, width), source)


def _copy_runs(
    weight: Tensor, source: Tensor, region: tuple[tuple[int, int], ...], dim: int, runs: tuple[tuple[int, int], ...]
) -> None:
    """Copies the rows of `runs` along `dim` from a source, which fills `region` of the whole weight, to the share."""
    source = source.reshape([stop - start for start, stop in region])
    first, end = region[dim]
    offset = 0
    for start, size in runs:
        low, high = max(start, first), min(start + size, end)
        if low < high:
            target = [slice(begin, stop) for begin, stop in region]
            target[dim] = slice(offset + low - start, offset + high - start)
            weight[tuple(target)].copy_(source.narrow(dim, low - first, high - low))
        offset += size


def _apply(view: View, source: Tensor) -> Tensor:
    """The part of the tensor that the view selects; a copy only if the merged axes are not adjacent in memory."""
    part = source.reshape(view.axes)[tuple(slice(start, stop) for start, stop in view.ranges)]
    return part.permute(view.order).reshape(view.size)
