"""Streams a checkpoint's tensors into the layout's own weights: fused, transposed, tied as the layout says.

Each checkpoint tensor is read once, straight from the mapped file into its place; nothing is held twice.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from sageLLM.runtime.core.layout import WeightSpec
from sageLLM.runtime.engine.safetensors_reader import Checkpoint


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


def _load(spec: WeightSpec, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Tensor:
    weight = torch.empty(spec.shape, dtype=dtype, device=device)
    start = 0
    for place, part in enumerate(spec.parts):
        source = checkpoint.read(part.name)
        target = weight.select(spec.dim, place) if spec.stack else weight.narrow(spec.dim, start, part.size)
        target.copy_(source.t() if spec.transpose else source)
        start += part.size
    return weight
