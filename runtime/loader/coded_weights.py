"""Weights of the layout that stay codes: fused, stacked, split and divided over ranks as float weights are.

Codes, scales and zeros of a weight have the same rows, so that they are moved in the same way. A weight with columns
that are moved, or with parts that have no common codes, is dequantised; the reason is returned.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.model.weights import Part, View, WeightSpec, share_runs, share_shape
from sageLLM.runtime.kernels.cpu.coded import CodedWeight
from sageLLM.runtime.kernels.cpu.packing import DEPTH
from sageLLM.runtime.loader.common_codes import with_common_codes
from sageLLM.runtime.loader.safetensors_reader import Checkpoint

Fill = Callable[[Tensor, Part, Tensor, int], None]
"""Copies the rows of a part to their place: the target, the part, the rows, and the number of their columns."""


def load_codes(
    spec: WeightSpec, checkpoint: Checkpoint, dtype: torch.dtype, fill: Fill, rank: int, tp: int
) -> CodedWeight | str | None:
    """The weight, or the share of a rank, as codes; else the reason, or None if it is not quantised."""
    parts: list[CodedWeight] = []
    regions: list[Part] = []
    if spec.shard is not None and spec.shard.kind == "first":
        return None
    for part in spec.parts:
        found = checkpoint.read_codes(part.name, dtype)
        if not isinstance(found, CodedWeight):
            return found if not parts or found else "its parts are not all quantised"
        part = _by_output(part, found)
        if (reason := _why_not_rows(part, found, len(spec.shape))) is not None:
            return reason
        parts.append(found)
        regions.append(part)
    common = with_common_codes(parts)
    if common is None:
        return "its parts have different codes or groups"
    parts = common
    columns = _columns(spec, rank, tp)
    if columns is not None and not _are_groups(columns, parts[0]):
        return f"shares that cut its groups of {_step(parts[0])} inputs"
    pairs = [(part, one if columns is None else _cut(one, *columns)) for part, one in zip(regions, parts, strict=True)]
    return _joined(spec, pairs, dtype, fill, tp)


def _by_output(part: Part, source: CodedWeight) -> Part:
    """A part of a tensor that is stored by input, as one of the same tensor with its last two dims swapped."""
    if tuple(source.shape) == tuple(part.shape) or len(source.shape) != 3 or part.view is None:
        return part
    *outer, inner, rows = part.shape
    if tuple(source.shape) != (*outer, rows, inner):
        return part
    view = part.view
    at = max((i for i, n in enumerate(view.axes) if n == inner and prod(view.axes[:i]) == prod(outer)), default=None)
    if at is None or prod(view.axes[at + 1 :]) != rows:
        return part
    moved = [*range(at), *range(at + 1, len(view.axes)), at]  # the axes of the view by their new positions
    swapped = View(
        tuple(view.axes[axis] for axis in moved),
        tuple(moved.index(axis) for axis in view.order),
        view.size,
        tuple((moved.index(axis), start, stop) for axis, start, stop in view.take),
    )
    return replace(part, shape=(*outer, rows, inner), view=swapped)


def _why_not_rows(part: Part, source: CodedWeight, rank: int) -> str | None:
    inner, view = source.shape[-1], part.view
    if tuple(source.shape) != tuple(part.shape):
        return "it is stored by input"
    if view is not None:
        is_kept = view.axes[-1] == view.size[-1] == inner and view.order[-1] == len(view.axes) - 1
        if not is_kept or any(axis == len(view.axes) - 1 for axis, _, _ in view.take):
            return "its inputs are moved"
    return None if part.region(rank)[-1] == (0, inner) else "its inputs are stacked"


def _columns(spec: WeightSpec, rank: int, tp: int) -> tuple[int, int] | None:
    """The inputs (start, size) of a share that divides them."""
    if tp == 1 or spec.shard is None or spec.shard.dim != len(spec.shape) - 1:
        return None
    [run] = share_runs(spec, rank, tp)
    return run


def _step(weight: CodedWeight) -> int:
    """The multiple of inputs at which a weight may be cut."""
    step = weight.group if weight.group < weight.shape[-1] else DEPTH
    if weight.factors is not None and weight.factors.shape[-1] > 1:
        step = weight.shape[-1] // weight.factors.shape[-1]
    return lcm(step, DEPTH)


def _are_groups(columns: tuple[int, int], weight: CodedWeight) -> bool:
    return all(number % _step(weight) == 0 for number in columns)


def _cut(weight: CodedWeight, start: int, size: int) -> CodedWeight:
    """The inputs from `start` on; each tensor has a number of elements that divides them, or one for all."""
    inner = weight.shape[-1]

    def cut(x: Tensor) -> Tensor:
        width = x.shape[-1]
        return x if width == 1 else x.narrow(-1, start * width // inner, size * width // inner)

    group = weight.group if weight.group < inner else size
    found = weight.with_parts(cut)
    return replace(found, shape=torch.Size((*weight.shape[:-1], size)), group=group)


def _joined(
    spec: WeightSpec, parts: Sequence[tuple[Part, CodedWeight]], dtype: torch.dtype, fill: Fill, tp: int
) -> CodedWeight:
    shape = torch.Size(share_shape(spec, tp))
    part, first = parts[0]
    if len(parts) == 1 and part.view is None and first.shape == shape and (tp == 1 or spec.shard is None):
        return replace(first, dtype=dtype)
    names = {name: one for _, weight in parts for name, one in weight.parts.items()}
    # Rows of padding have scales of 0, and divisors of 1.
    found: dict[str, Any] = {
        name: torch.full((*shape[:-1], one.shape[-1]), int(name == "factors"), dtype=_common(name, parts))
        for name, one in names.items()
    }
    for name, target in found.items():
        for part, weight in parts:
            if (source := weight.parts.get(name)) is not None:
                fill(target, part, source.to(target.dtype), target.shape[-1])
            elif name == "zeros":
                fill(target, part, torch.zeros(weight.scales.shape, dtype=torch.int8), target.shape[-1])
    return CodedWeight(first.form, shape, first.group, dtype=dtype, **found)


def _common(name: str, parts: Sequence[tuple[Part, CodedWeight]]) -> torch.dtype:
    """The type of the tensors of all parts; scales of several types become float32."""
    kinds = {weight.parts[name].dtype for _, weight in parts if name in weight.parts}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def with_columns(part: Part, width: int) -> Part:
    """The part with `width` columns in place of its inputs."""
    view = part.view
    if view is not None:
        view = View((*view.axes[:-1], width), view.order, (*view.size[:-1], width), view.take)
    return replace(part, shape=(*part.shape[:-1], width), view=view)
