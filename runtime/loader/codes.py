"""Codes of quantised weights, moved from the tensors of a checkpoint to the form of the kernels on packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import Codes, Format
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, Form, words_of
from sageLLM.runtime.kernels.cpu.packing import DEPTH
from sageLLM.runtime.loader.dequantize import chunks, part_of

Parts = Callable[..., tuple[Tensor | int, ...]]


def why_not_coded(format: Format, stored: Mapping[str, Tensor], sizes: Mapping[str, int]) -> str | None:
    """The reason why a weight cannot be kept as codes, or None."""
    codes = format.codes
    if codes is None:
        return f"{format.name} is not codes with a scale per group"
    if format.weight not in (("N", "K"), ("E", "N", "K")):
        return f"{format.name} is stored by input"
    if _form(codes, sizes) is None:
        return f"codes of {sizes[codes.kind]} bits"
    group, inner = _group(codes, sizes), sizes["K"]
    if group < inner and group % DEPTH:
        return f"groups of {group} inputs, and not of a multiple of {DEPTH}"
    if codes.index and not torch.equal(stored[codes.index].long(), torch.arange(inner) // group):
        return "groups in the order of activations"
    return None


def coded(
    format: Format, function: Parts, stored: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype
) -> CodedWeight:
    """The weight from its stored tensors, some rows at a time; `why_not_coded` must have returned None."""
    assert format.codes is not None, "checked by why_not_coded"
    form = _form(format.codes, sizes)
    assert form is not None, "checked by why_not_coded"
    used = {name: size for name, size in sizes.items() if name in function.__code__.co_varnames}
    words, scales, zeros = [], [], []
    for ranges in chunks(format, sizes):
        own = {**used, **{dim: high - low for dim, (low, high) in ranges.items() if dim in used}}
        parts = [part_of(one, stored[one.name], sizes, ranges) for one in format.tensors]
        found = _Chunk(form, format.codes.kind, function(*parts, **own))
        words.append(found.words)
        scales.append(found.scales)
        zeros.append(found.zeros)
    shape = torch.Size(sizes[dim] for dim in format.weight)
    whole = [torch.cat([one.flatten(0, -2) for one in parts]).view(*shape[:-1], -1) for parts in (words, scales, zeros)]
    has_zeros = bool(whole[2].any())
    return CodedWeight(
        form.name,
        shape,
        _group(format.codes, sizes),
        whole[0],
        _short(whole[1]),
        whole[2] if has_zeros else None,
        dtype,
    )


class _Chunk:
    """Some rows: words, scales [..., N, groups], and zeros relative to the center of the codes."""

    def __init__(self, form: Form, kind: str, parts: tuple[Tensor | int, ...]) -> None:
        codes, scales = parts[:2]
        assert isinstance(codes, Tensor) and isinstance(scales, Tensor), "the codes and scales are tensors"
        zero: Tensor | int = parts[2] if len(parts) > 2 else 0
        center = form.center
        if kind == "i8":
            codes, zero = codes + center, zero + center
        self.words = words_of(codes, form)
        self.scales = scales if scales.dim() == codes.dim() else scales.expand(*codes.shape[:-1], 1)
        if form.values is not None:
            self.scales = self.scales / 2  # the values of the codes are in units of 1/2
        zeros = torch.as_tensor(zero - center if form.values is None else 0)
        self.zeros = zeros.expand(self.scales.shape).to(torch.int8)


def _form(codes: Codes, sizes: Mapping[str, int]) -> Form | None:
    if codes.kind == "fp4":
        return FORMS["fp4"]
    if codes.kind in ("i8", "u8"):
        return FORMS["int8"]
    return FORMS.get(f"int{sizes.get(codes.kind, codes.kind)}")


def _group(codes: Codes, sizes: Mapping[str, int]) -> int:
    if not codes.group:
        return sizes["K"]
    return min(sizes["K"], int(codes.group) if codes.group.isdigit() else sizes[codes.group])


def _short(scales: Tensor) -> Tensor:
    """The scales in 16 bits, if these hold them exactly."""
    for dtype in (torch.bfloat16, torch.float16) if scales.dtype == torch.float32 else ():
        short = scales.to(dtype)
        if torch.equal(short.float(), scales):
            return short
    return scales.contiguous()
