"""Weights of small codes, as checkpoints of quantised models have them, and their packed form for the CPU's GEMMs.

A weight is (code - center - zero) * scale, with a scale, and a zero if there are any, per output and group of inputs.
The panels are described in `coded.h`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sageLLM.runtime.kernels.cpu.packing import DEPTH, LINE, PANEL, PackedWeight, WeightMemory, unpack

HEADER_BYTES = 64
SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of scales; their indices are in the header."""
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of FP4 codes."""


@dataclass(frozen=True, slots=True)
class Form:
    """A form of codes, with which a kernel is compiled: the codes of 4 bytes, the center, and values by code."""

    name: str
    step: int
    center: int
    values: tuple[int, ...] | None = None


FORMS = {one.name: one for one in (Form("int8", 4, 128), Form("int4", 8, 8), Form("fp4", 8, 0, E2M1))}


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight [N, K], or [E, N, K], as codes in 32-bit words along K.

    words i32[..., N, ceil(K/32)*32/step]; scales [..., N, groups]; zeros i8 of the same shape, or None. `group` is the
    number of inputs of a scale.
    """

    form: str
    shape: torch.Size
    group: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        return sum(one.nbytes for one in (self.words, self.scales, self.zeros) if one is not None)

    def numel(self) -> int:
        return self.shape.numel()


def words_of(codes: Tensor, form: Form) -> Tensor:
    """Unsigned codes [..., K] as words: the first inputs of a word are in the low halves of its bytes."""
    inner = codes.shape[-1]
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -inner % DEPTH), value=form.center)
    if form.step == 8:
        runs = padded.view(*padded.shape[:-1], -1, 2, 4)
        padded = (runs[..., 0, :] | runs[..., 1, :] << 4).flatten(-2)
    return padded.contiguous().view(torch.int32)


def codes_of(words: Tensor, form: Form, inner: int) -> Tensor:
    """The codes u8[..., K] of words."""
    found = words.contiguous().view(torch.uint8)
    if form.step == 8:
        runs = found.view(*found.shape[:-1], -1, 1, 4)
        found = torch.cat([runs & 0xF, runs >> 4], -2).flatten(-3)
    return found[..., :inner]


def decoded(weight: CodedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, computed in float32 and rounded once."""
    form = FORMS[weight.form]
    found = torch.empty(weight.shape, dtype=dtype)
    rows = found.view(-1, weight.shape[-1])
    words, scales = weight.words.view(len(rows), -1), weight.scales.view(len(rows), -1)
    zeros = None if weight.zeros is None else weight.zeros.view(len(rows), -1)
    step = max(1, 2**21 // max(1, rows.shape[-1]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        codes = codes_of(words[part], form, rows.shape[-1]).int()
        codes = torch.tensor(form.values, dtype=torch.int32)[codes] if form.values else codes - form.center
        if zeros is not None:
            codes = codes - _spread(zeros[part].int(), weight.group, rows.shape[-1])
        rows[part] = codes * _spread(scales[part].float(), weight.group, rows.shape[-1])
    return found


def _spread(x: Tensor, group: int, inner: int) -> Tensor:
    return x.repeat_interleave(group, -1)[..., :inner]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The sizes of a packed weight; offsets in bytes within a panel."""

    experts: int
    gates: int
    blocks: int
    groups: int
    group: int
    zeros: int
    codes: int
    panel_bytes: int

    @property
    def num_bytes(self) -> int:
        return HEADER_BYTES + self.experts * self.gates * self.blocks * self.panel_bytes


def _layout(weight: CodedWeight, gates: int) -> _Layout:
    features, inner = weight.shape[-2] // gates, weight.shape[-1]
    groups = weight.scales.shape[-1]
    scale_bytes = _padded(groups * PANEL * weight.scales.itemsize)
    zero_bytes = 0 if weight.zeros is None else _padded(groups * PANEL)
    depth = -(-inner // DEPTH) * DEPTH
    start = scale_bytes + zero_bytes
    return _Layout(
        experts=weight.shape[0] if len(weight.shape) == 3 else 1,
        gates=gates,
        blocks=-(-features // PANEL),
        groups=groups,
        group=-(-weight.group // DEPTH) * DEPTH,
        zeros=scale_bytes if zero_bytes else 0,
        codes=start,
        panel_bytes=start + depth // FORMS[weight.form].step * PANEL * 4,
    )


def _padded(size: int) -> int:
    return -(-size // LINE) * LINE


def pack_codes(weight: CodedWeight, gates: int, memory: WeightMemory | None = None) -> PackedWeight:
    """The packed form; the panels of gates alternate."""
    layout = _layout(weight, gates)
    memory = memory if memory is not None else WeightMemory(reserve=0)
    values = memory.take(layout.num_bytes, torch.uint8)
    header = (layout.group, layout.panel_bytes, layout.zeros, layout.codes, SCALE_TYPES.index(weight.scales.dtype))
    values[:HEADER_BYTES].zero_()
    values[: 8 * len(header)] = torch.tensor(header, dtype=torch.int64).view(torch.uint8)
    panels = values[HEADER_BYTES:].view(layout.experts, layout.blocks, gates, layout.panel_bytes)
    panels[..., : layout.codes].zero_()
    _fill(panels[..., layout.codes :], weight.words, layout)
    _fill(panels[..., : layout.groups * PANEL * weight.scales.itemsize], weight.scales, layout)
    if weight.zeros is not None:
        _fill(panels[..., layout.zeros : layout.zeros + layout.groups * PANEL], weight.zeros, layout)
    return PackedWeight(values, weight.shape, gates, form=weight.form, element=weight.dtype)


def _fill(target: Tensor, rows: Tensor, layout: _Layout) -> None:
    """Copies rows [.., N, width] to the panels [experts, blocks, gates, width * 16] of bytes, outputs last."""
    width, features = rows.shape[-1], rows.shape[-2] // layout.gates
    source = rows.view(layout.experts, layout.gates, features, width)
    panels = target.view(rows.dtype).view(*target.shape[:-1], width, PANEL)
    whole = features // PANEL
    if whole:
        inside = source[:, :, : whole * PANEL].reshape(layout.experts, layout.gates, whole, PANEL, width)
        panels[:, :whole].copy_(inside.permute(0, 2, 1, 4, 3))
    if whole < layout.blocks:
        rest = features - whole * PANEL
        panels[:, whole, :, :, rest:] = 0
        panels[:, whole, :, :, :rest].copy_(source[:, :, whole * PANEL :].permute(0, 1, 3, 2))


def unpack_codes(packed: PackedWeight) -> CodedWeight:
    """The codes of a packed weight, for an op without a kernel that reads it packed."""
    assert packed.form is not None, "a packed weight of codes has a form"
    group, panel_bytes, zeros, codes, scale_type = packed.values[: 8 * 5].clone().view(torch.int64).tolist()
    experts = packed.shape[0] if len(packed.shape) == 3 else 1
    features, inner = packed.shape[-2] // packed.gates, packed.shape[-1]
    groups = -(-inner // group)
    panels = packed.values[HEADER_BYTES:].view(experts, -1, packed.gates, panel_bytes)

    def rows(first: int, size: int, dtype: torch.dtype) -> Tensor:
        part = panels[..., first : first + size].contiguous().view(dtype)
        found = part.view(*part.shape[:-1], -1, PANEL).permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :features]
        return found.reshape(*packed.shape[:-1], -1)

    kind = SCALE_TYPES[scale_type]
    return CodedWeight(
        packed.form,
        packed.shape,
        group if groups > 1 else inner,
        rows(codes, panel_bytes - codes, torch.int32),
        rows(0, groups * PANEL * kind.itemsize, kind),
        rows(zeros, groups * PANEL, torch.int8) if zeros else None,
        packed.dtype,
    )


def group_of(packed: PackedWeight) -> int:
    """The inputs of a scale of packed codes, rounded up to a multiple of DEPTH."""
    return int(packed.values[:8].clone().view(torch.int64))


def unpacked(packed: PackedWeight) -> Tensor:
    """An unpacked float copy of a packed weight, as `packing.unpack` makes it."""
    return unpack(packed) if packed.form is None else decoded(unpack_codes(packed), packed.dtype)
