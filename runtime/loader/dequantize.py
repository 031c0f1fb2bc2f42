"""Values of quantised weights in a float type, computed in float32 a bounded number of elements at a time."""

from collections.abc import Callable, Iterator, Mapping
from inspect import signature

import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import Format, StoredPart

CHUNK = 2**21
"""Elements that are computed at a time; intermediate results take about 20 bytes for each."""
Ranges = Mapping[str, tuple[int, int]]


def dequantize(
    format: Format,
    values: Callable[..., Tensor],
    stored: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight from its stored tensors, which have the dims of the file. `sizes` are those of dims and of the format.

    Values are computed in float32 and rounded once.
    """
    weight = torch.empty([sizes[dim] for dim in format.weight], dtype=dtype)
    used = signature(values).parameters.keys() & sizes.keys()
    for ranges in chunks(format, sizes):
        own = {**sizes, **{dim: high - low for dim, (low, high) in ranges.items()}}
        parts = [part_of(one, stored[one.name], sizes, ranges) for one in format.tensors]
        target = weight
        for axis, dim in enumerate(format.weight):
            low, high = ranges.get(dim, (0, sizes[dim]))
            target = target.narrow(axis, low, high - low)
        target.copy_(values(*parts, **{name: own[name] for name in used}, of=torch.float32))
    return weight


def chunks(format: Format, sizes: Mapping[str, int]) -> Iterator[Ranges]:
    """Ranges of rows [N] and single experts [E], in order; all stored tensors can be cut there."""
    granules = [extent.granule(sizes) for one in format.tensors for extent in one.dims if extent.dim == "N"]
    granule = max(granules, default=1)
    step = max(1, CHUNK // max(1, sizes["K"]) // granule) * granule
    for expert in range(sizes.get("E", 1)):
        own = {"E": (expert, expert + 1)} if "E" in sizes else {}
        for low in range(0, sizes["N"], step):
            yield {"N": (low, min(low + step, sizes["N"])), **own}


def part_of(part: StoredPart, tensor: Tensor, sizes: Mapping[str, int], ranges: Ranges) -> Tensor:
    """The elements of a stored tensor for ranges of dims."""
    for axis, extent in enumerate(part.dims):
        if extent.dim in ranges:
            low, high = (extent.size({**sizes, extent.dim: end}) for end in ranges[extent.dim])
            tensor = tensor.narrow(axis, low, high - low)
    return tensor
