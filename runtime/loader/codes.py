"""Codes of quantised weights, moved from the tensors of a checkpoint to the form of the kernels on packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import Codes, Format
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, Form, words_of
from sageLLM.runtime.kernels.cpu.packing import DEPTH
from sageLLM.runtime.loader.dequantize import chunks, part_of

Parts = Callable[..., tuple[Tensor | int, ...]]
ROWS = {("N", "K"): ("N", "K"), ("E", "N", "K"): ("E", "N", "K"), ("E", "K", "N"): ("E", "N", "K")}
"""The dims of codes by those of the weight: inputs are last."""
STEP = DEPTH // 2
"""The least group."""


def why_not_coded(format: Format, stored: Mapping[str, Tensor], sizes: Mapping[str, int]) -> str | None:
    """The reason why a weight cannot be kept as codes, or None."""
    codes = format.codes
    if codes is None:
        return f"{format.name} is not codes with a scale per group"
    if format.weight not in ROWS:
        return f"{format.name} is stored by input"
    if _form(codes, sizes) is None:
        return f"codes of {sizes.get(codes.kind, codes.kind)} bits"
    group, inner = _group(codes, sizes), sizes["K"]
    if group < inner and group != STEP and group % DEPTH:
        return f"groups of {group} inputs, and not of {STEP} or a multiple of {DEPTH}"
    if codes.index and not torch.equal(stored[codes.index].long(), torch.arange(inner) // group):
        return "groups in the order of activations"
    return "it contains NaN" if any(map(_has_nan, stored.values())) else None


def _has_nan(tensor: Tensor) -> bool:
    is_e4m3 = tensor.dtype == torch.float8_e4m3fn
    return is_e4m3 and bool((tensor.contiguous().view(torch.uint8).bitwise_and(0x7F) == 0x7F).any())


def coded(
    format: Format, function: Parts, stored: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype
) -> CodedWeight:
    """The weight from its stored tensors, some rows at a time; `why_not_coded` must have returned None."""
    assert format.codes is not None, "checked by why_not_coded"
    form = _form(format.codes, sizes)
    assert form is not None, "checked by why_not_coded"
    used = {name: size for name, size in sizes.items() if name in function.__code__.co_varnames}
    found: dict[str, list[Tensor]] = {}
    for ranges in chunks(format, sizes):
        own = {**used, **{dim: high - low for dim, (low, high) in ranges.items() if dim in used}}
        stored_parts = [part_of(one, stored[one.name], sizes, ranges) for one in format.tensors]
        parts = dict(zip(format.codes.parts, function(*stored_parts, **own), strict=True))
        for name, one in _moved(form, format.codes.kind, parts).items():
            found.setdefault(name, []).append(one.flatten(0, -2))
    shape = torch.Size(sizes[dim] for dim in ROWS[format.weight])
    whole: dict[str, Any] = {
        name: (torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()).view(*shape[:-1], -1)
        for name, parts in found.items()
    }
    if "minima" not in whole and not whole["zeros"].any():
        del whole["zeros"]
    whole["scales"] = _short(whole["scales"]) if "factors" not in whole else whole["scales"]
    return CodedWeight(form.name, shape, _group(format.codes, sizes), dtype=dtype, **whole)


def _moved(form: Form, kind: str, parts: Mapping[str, Tensor | int]) -> dict[str, Tensor]:
    """The tensors of a CodedWeight for some rows [..., N, ...]; zeros are relative to the center of the codes."""
    parts = _with_factors(parts)
    codes, scales = parts["codes"], parts["scales"]
    assert isinstance(codes, Tensor) and isinstance(scales, Tensor), "the codes and scales are tensors"
    zeros = torch.as_tensor(parts.get("zeros", 0))
    rows = codes.shape[:-1]
    if scales.dim() != codes.dim():  # one for each row, or for all
        scales = scales.unsqueeze(-1) if scales.shape == rows else scales.expand(*rows, 1)
    if form.values is None and not zeros.dim() and "minima" not in parts and int(zeros) != form.center:
        # A zero of all codes is moved to the center, unless the codes would leave their range.
        codes, distance = _in_bytes(codes, kind, form), form.center - int(zeros)
        moved = codes + (distance % 256 if codes.dtype == torch.uint8 else distance)
        if kind == "i8" or not (moved >> form.bits).any():
            codes, zeros = moved, torch.as_tensor(form.center)
    found = {"words": words_of(codes.view(torch.uint8) if kind == "f8" else codes, form)}
    factors = parts.get("factors")
    unit = 1 if form.name != "fp4" else 2  # the values of FP4 codes are in units of 1/2
    if factors is None:
        found["scales"] = scales if unit == 1 else scales.float() / unit
    elif scales.dtype == torch.float8_e4m3fn:
        found |= {"scales": scales, "factors": torch.as_tensor(factors).float().expand(*rows, 1) * unit}
    else:
        found |= {"scales": scales.to(torch.int8), "factors": torch.as_tensor(factors)}
    if "minima" in parts:
        zeros = torch.as_tensor(parts["minima"])
        found["minima"] = torch.as_tensor(parts["minimum_factors"])
    elif form.values is not None:
        zeros = torch.zeros(())
    else:
        zeros = zeros - form.center
    return found | {"zeros": zeros.expand(scales.shape).to(torch.int8)}


def _in_bytes(codes: Tensor, kind: str, form: Form) -> Tensor:
    """Codes without a sign, modulo 256 unless a sum could return to the range of the form without being seen."""
    if codes.dtype == torch.int8:
        codes = codes.view(torch.uint8)
    return codes if kind == "i8" or form.bits < 8 else codes.int()


def _with_factors(parts: Mapping[str, Tensor | int]) -> Mapping[str, Tensor | int]:
    """Scales and offsets as factors: codes * (1 * scale) - 1 * (-offset), for which kernels have minima."""
    if "offsets" not in parts:
        return parts
    ones = torch.ones_like(torch.as_tensor(parts["scales"]), dtype=torch.int8)
    factors, minimum_factors = parts["scales"], -torch.as_tensor(parts["offsets"])
    return {**parts, "scales": ones, "factors": factors, "minima": ones, "minimum_factors": minimum_factors}


def _form(codes: Codes, sizes: Mapping[str, int]) -> Form | None:
    if codes.kind in ("fp4", "f8"):
        return FORMS["fp4" if codes.kind == "fp4" else "fp8"]
    if codes.kind in ("i8", "u8"):
        return FORMS["int8"]
    bits = int(sizes.get(codes.kind, codes.kind))
    return next((FORMS[f"int{width}"] for width in (4, 6, 8) if bits <= width), None)


def _group(codes: Codes, sizes: Mapping[str, int]) -> int:
    if not codes.group:
        return sizes["K"]
    return min(sizes["K"], int(codes.group) if codes.group.isdigit() else sizes[codes.group])


def _short(scales: Tensor) -> Tensor:
    """The scales in 8 bits, as powers of two, or in 16 bits, if these hold them exactly."""
    if scales.dtype == torch.float8_e4m3fn:
        scales = scales.float()
    if _are_powers(scales):
        exponents = scales.float().view(torch.int32) >> 23
        return exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    for dtype in (torch.bfloat16, torch.float16) if scales.dtype == torch.float32 else ():
        short = scales.to(dtype)
        if torch.equal(short.float(), scales):
            return short
    return scales.contiguous()


def _are_powers(scales: Tensor) -> bool:
    """Whether all are 2^(e - 127) of a byte e from 1 to 254."""
    bits = scales.float().view(torch.int32)
    return bool(((bits & 0x7FFFFF == 0) & (bits > 0) & (bits < 255 << 23)).all())
