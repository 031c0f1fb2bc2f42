"""Weights of the layout that stay codes: fused, stacked, split and divided over ranks as float weights are.

Codes, scales and zeros of a weight have the same rows, so that they are moved in the same way. A weight whose columns
are moved, or whose parts have different codes, is dequantised; the reason is returned.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sageLLM.runtime.core.model.weights import Part, View, WeightSpec, share_runs, share_shape
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight
from sageLLM.runtime.kernels.cpu.packing import DEPTH
from sageLLM.runtime.loader.safetensors_reader import Checkpoint

Fill = Callable[[Tensor, Part, Tensor, int], None]
"""Copies the rows of a part to their place: the target, the part, the rows, and the number of their columns."""


def load_codes(
    spec: WeightSpec, checkpoint: Checkpoint, dtype: torch.dtype, fill: Fill, rank: int, tp: int
) -> CodedWeight | str | None:
    """The weight, or the share of a rank, as codes; else the reason, or None if it is not quantised."""
    parts: list[CodedWeight] = []
    if spec.shard is not None and spec.shard.kind == "first":
        return None
    for part in spec.parts:
        found = checkpoint.read_codes(part.name, dtype)
        if not isinstance(found, CodedWeight):
            return found if not parts or found else "its parts are not all quantised"
        if (reason := _why_not_rows(part, found, len(spec.shape))) is not None:
            return reason
        parts.append(found)
    if len({(one.form, one.group) for one in parts}) != 1:
        return "its parts have different codes or groups"
    columns = _columns(spec, rank, tp)
    if columns is not None and not _are_groups(columns, parts[0]):
        return f"shares that cut its groups of {parts[0].group} inputs"
    return _joined(spec, [one if columns is None else _cut(one, *columns) for one in parts], dtype, fill, tp)


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


def _are_groups(columns: tuple[int, int], weight: CodedWeight) -> bool:
    step = weight.group if weight.group < weight.shape[-1] else DEPTH
    return all(number % step == 0 for number in columns)


def _cut(weight: CodedWeight, start: int, size: int) -> CodedWeight:
    step, is_grouped = FORMS[weight.form].step, weight.group < weight.shape[-1]

    def groups(x: Tensor) -> Tensor:
        return x.narrow(-1, start // weight.group, size // weight.group) if is_grouped else x

    return replace(
        weight,
        shape=torch.Size((*weight.shape[:-1], size)),
        group=weight.group if is_grouped else size,
        words=weight.words.narrow(-1, start // step, size // step),
        scales=groups(weight.scales),
        zeros=None if weight.zeros is None else groups(weight.zeros),
    )


def _joined(spec: WeightSpec, parts: list[CodedWeight], dtype: torch.dtype, fill: Fill, tp: int) -> CodedWeight:
    shape = torch.Size(share_shape(spec, tp))
    kinds = {one.scales.dtype for one in parts}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32
    # Rows of padding have scales of 0.
    first, rows = parts[0], shape[:-1]
    words = torch.zeros(*rows, first.words.shape[-1], dtype=torch.int32)
    scales = torch.zeros(*rows, first.scales.shape[-1], dtype=kind)
    has_zeros = any(one.zeros is not None for one in parts)
    zeros = torch.zeros(*rows, first.scales.shape[-1], dtype=torch.int8) if has_zeros else None
    for part, source in zip(spec.parts, parts, strict=True):
        fill(words, part, source.words, words.shape[-1])
        fill(scales, part, source.scales, scales.shape[-1])
        if zeros is not None and source.zeros is not None:
            fill(zeros, part, source.zeros, zeros.shape[-1])
    return CodedWeight(first.form, shape, first.group, words, scales, zeros, dtype)


def with_columns(part: Part, width: int) -> Part:
    """The part with `width` columns in place of its inputs."""
    view = part.view
    if view is not None:
        view = View((*view.axes[:-1], width), view.order, (*view.size[:-1], width), view.take)
    return replace(part, shape=(*part.shape[:-1], width), view=view)
