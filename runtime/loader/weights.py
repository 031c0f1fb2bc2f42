"""Streams a checkpoint's tensors into the layout's own weights: fused, stacked, taken apart, tied as the layout says.

Each element is copied once, straight from the mapped file into its place; nothing is held twice.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from sageLLM.runtime.core.model.weights import View, WeightSpec, share_runs
from sageLLM.runtime.loader.safetensors_reader import Checkpoint


def load_weights(
    specs: Iterable[WeightSpec], checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The weights by the names that graphs use. The checkpoint must have been checked against `specs` before."""
    weights: dict[str, Tensor] = {}
    ties: list[WeightSpec] = []
    for spec in specs:
        if spec.tied_to is not None:
            ties.append(spec)
        else:
            weights[spec.name] = _load(spec, checkpoint, dtype, device)
    return weights | {spec.name: weights[str(spec.tied_to)] for spec in ties}


def rank_share(spec: WeightSpec, weight: Tensor, rank: int, tp: int) -> Tensor:
    """What rank `rank` of `tp` holds of a whole weight; ConfigError if it does not come out even."""
    if spec.shard is None or tp == 1:
        return weight
    if spec.shard.kind == "first":
        return weight if rank == 0 else torch.zeros_like(weight)
    runs = [weight.narrow(spec.shard.dim, start, size) for start, size in share_runs(spec, rank, tp)]
    return torch.cat(runs, spec.shard.dim)


def _load(spec: WeightSpec, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Tensor:
    weight = torch.empty(spec.shape, dtype=dtype, device=device)
    for part in spec.parts:
        source = checkpoint.read(part.name)
        target = weight[tuple(slice(start, stop) for start, stop in part.place(len(spec.shape)))]
        target.copy_(source if part.view is None else _apply(part.view, source))
    return weight


def _apply(view: View, source: Tensor) -> Tensor:
    """The tensor taken apart; a copy only where the merged axes no longer lie one after another."""
    taken = source.reshape(view.axes)[tuple(slice(start, stop) for start, stop in view.ranges)]
    return taken.permute(view.order).reshape(view.size)
