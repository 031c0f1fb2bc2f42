"""Weights of small codes, as checkpoints of quantised models have them, and their packed form for the CPU's GEMMs.

A weight is (code - center - zero) * scale, with a scale, and a zero if there are any, per output and group of inputs;
or code * scale - minimum. The panels are described in `coded.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.kernels.cpu.packing import DEPTH, LINE, PANEL, PackedWeight, WeightMemory, native_form, unpack

HEADER_BYTES = 64
SCALE_TYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.int8, torch.float8_e4m3fn
)  # fmt: skip
"""Types of scales; their indices are in the header. Those in int8 have factors, those in e4m3 divisors."""
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of FP4 codes."""
E4M3 = tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())


@dataclass(frozen=True, slots=True)
class Form:
    """A form of codes, with which a kernel is compiled: their bits, the center, and values by code."""

    name: str
    bits: int
    center: int
    values: tuple[float, ...] | None = None

    @property
    def has_integers(self) -> bool:
        """Whether the values are integers times the scale, so that products with activations of 8 bits are."""
        return self.values is not E4M3

    @property
    def words(self) -> int:
        """The words of 32 bits for DEPTH codes."""
        return DEPTH * self.bits // 32


FORMS = {
    one.name: one
    for one in (
        Form("int8", 8, 128),
        Form("int6", 6, 32),
        Form("int4", 4, 8),
        Form("fp4", 4, 0, E2M1),
        Form("fp8", 8, 0, E4M3),
    )
}


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight [N, K], or [E, N, K], as codes in 32-bit words along K.

    words i32[..., N, ceil(K/32)*words]; scales [..., N, groups] of SCALE_TYPES; zeros i8 of the same shape, or None.
    `group` is the number of inputs of a scale. Scales in i8 and e4m3 have `factors` [..., N, supers] of f16 and f32,
    for equal numbers of groups. With `minima`, factors f16 of the zeros, these are minima. `activations` is the type of
    the codes that products round activations to, or None if they do not.
    """

    form: str
    shape: torch.Size
    group: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    dtype: torch.dtype = torch.bfloat16
    factors: Tensor | None = None
    minima: Tensor | None = None
    activations: str | None = None

    @property
    def native(self) -> str:
        """As in PackedWeight."""
        return native_form(self.form, self.activations)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors by their names; all have the same rows."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        return sum(one.nbytes for one in self.parts.values())

    def numel(self) -> int:
        return self.shape.numel()

    def with_parts(self, change: Callable[[Tensor], Tensor]) -> CodedWeight:
        """A copy with each of the tensors changed."""
        changed: dict[str, Any] = {name: change(one) for name, one in self.parts.items()}
        return replace(self, **changed)


PARTS = ("words", "scales", "zeros", "factors", "minima")
"""The fields of CodedWeight that are tensors."""


def words_of(codes: Tensor, form: Form) -> Tensor:
    """Unsigned codes [..., K] as words, in the order of `read_part` in `coded.h`."""
    padding = -codes.shape[-1] % DEPTH
    padded = codes.to(torch.uint8)
    if padding:
        padded = torch.nn.functional.pad(padded, (0, padding), value=form.center)
    if form.bits == 8:
        found = padded
    elif form.bits == 4:
        found = _shared(padded, 4)
    else:
        low, high = _shared(padded & 0xF, 4), _shared(padded >> 4, 2)
        found = torch.cat([_runs(low, DEPTH // 2), _runs(high, DEPTH // 4)], -1).flatten(-2)
    return found.contiguous().view(torch.int32)


def _runs(x: Tensor, *sizes: int) -> Tensor:
    """The last dim as runs of the given sizes."""
    return x.reshape(*x.shape[:-1], -1, *sizes)


def _shared(fields: Tensor, bits: int) -> Tensor:
    """Bytes of fields: those of each run of four bytes, first the low fields of all four."""
    runs = _runs(fields.contiguous().view(torch.int32), 8 // bits)
    found = runs[..., 0]
    for i in range(1, 8 // bits):
        found = found | runs[..., i] << bits * i
    return found.contiguous().view(torch.uint8)


def _fields(data: Tensor, bits: int) -> Tensor:
    """The fields of bytes that `_shared` made."""
    runs = _runs(data, 1, 4)
    return torch.cat([runs >> bits * i & 2**bits - 1 for i in range(8 // bits)], -2).flatten(-3)


def codes_of(words: Tensor, form: Form, inner: int) -> Tensor:
    """The codes u8[..., K] of words."""
    found = words.contiguous().view(torch.uint8)
    if form.bits == 4:
        found = _fields(found, 4)
    elif form.bits == 6:
        steps = _runs(found, DEPTH * 3 // 4)
        low, high = _fields(steps[..., : DEPTH // 2], 4), _fields(steps[..., DEPTH // 2 :], 2)
        found = (low | high << 4).flatten(-2)
    return found[..., :inner]


def decoded(weight: CodedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, computed in float32 and rounded once."""
    found = torch.empty(weight.shape, dtype=dtype)
    rows = found.view(-1, weight.shape[-1])
    flat = weight.with_parts(lambda one: one.reshape(len(rows), -1))
    step = max(1, 2**21 // max(1, rows.shape[-1]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        rows[part] = _values(flat.with_parts(lambda one, part=part: one[part]), rows.shape[-1])  # type: ignore[misc]
    return found


def _values(weight: CodedWeight, inner: int) -> Tensor:
    form = FORMS[weight.form]
    return values_of(codes_of(weight.words, form, inner), form, weight.group, group_scales(weight))


class GroupScales(NamedTuple):
    """The scale [..., N, groups] of each group of inputs, and its minimum or its zero."""

    scales: Tensor
    minima: Tensor | None = None
    zeros: Tensor | None = None


def group_scales(weight: CodedWeight) -> GroupScales:
    """Those of a weight; scales and minima with factors are multiplied out, in float32."""
    groups = weight.scales.shape[-1]

    def by_group(factors: Tensor) -> Tensor:
        return _spread(factors.float(), -(-groups // factors.shape[-1]), groups)

    scales = weight.scales
    if weight.factors is not None:
        factors = by_group(weight.factors)
        scales = scales.float() * factors if scales.dtype == torch.int8 else scales.float() / factors
    if weight.minima is not None and weight.zeros is not None:
        return GroupScales(scales, minima=weight.zeros.float() * by_group(weight.minima))
    return GroupScales(scales, zeros=weight.zeros)


def values_of(codes: Tensor, form: Form, group: int, by_group: GroupScales) -> Tensor:
    """The float32 values of unsigned codes [..., N, K]."""
    inner = codes.shape[-1]
    scales = _spread(by_group.scales.float(), group, inner)
    if by_group.minima is not None:
        return codes * scales - _spread(by_group.minima, group, inner)
    if form.values is None:
        values = codes.float() - form.center
    else:
        values = torch.tensor(form.values, dtype=torch.float32, device=codes.device)[codes.int()]
    if by_group.zeros is not None:
        values = values - _spread(by_group.zeros.float(), group, inner)
    return values * scales


def _spread(x: Tensor, group: int, inner: int) -> Tensor:
    return x.repeat_interleave(group, -1)[..., :inner]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The sizes of a packed weight; `starts` and `sizes` of the parts are in bytes within a panel."""

    experts: int
    gates: int
    blocks: int
    starts: dict[str, int]
    sizes: dict[str, int]
    panel_bytes: int

    @property
    def num_bytes(self) -> int:
        return HEADER_BYTES + self.experts * self.gates * self.blocks * self.panel_bytes


def _layout(weight: CodedWeight, gates: int) -> _Layout:
    starts, sizes, size = {}, {}, 0
    # Kernels read the scales of all 32 inputs of a step, also where the last one has a group of 16: 0 for the others.
    padding = PANEL if weight.group < DEPTH and weight.scales.shape[-1] % (DEPTH // weight.group) else 0
    for name in ("scales", "factors", "zeros", "minima", "words"):
        if (part := weight.parts.get(name)) is not None:
            starts[name], sizes[name] = size, part.shape[-1] * PANEL * part.itemsize
            size += -(-(sizes[name] + padding * part.itemsize) // LINE) * LINE
    experts = weight.shape[0] if len(weight.shape) == 3 else 1
    return _Layout(experts, gates, -(-(weight.shape[-2] // gates) // PANEL), starts, sizes, size)


def pack_codes(weight: CodedWeight, gates: int, memory: WeightMemory | None = None) -> PackedWeight:
    """The packed form; the panels of gates alternate."""
    layout = _layout(weight, gates)
    memory = memory if memory is not None else WeightMemory(reserve=0)
    values = memory.take(layout.num_bytes, torch.uint8)
    group = weight.group if weight.group < weight.shape[-1] else -(-weight.group // DEPTH) * DEPTH
    starts, shift = layout.starts, 0
    if weight.factors is not None:
        shift = _shift(weight.scales.shape[-1], weight.factors.shape[-1])
    header = (
        group,
        layout.panel_bytes,
        starts.get("zeros", 0),
        starts["words"],
        SCALE_TYPES.index(weight.scales.dtype),
        starts.get("factors", 0),
        starts.get("minima", 0),
        shift,
    )
    values[:HEADER_BYTES] = torch.tensor(header, dtype=torch.int64).view(torch.uint8)
    panels = values[HEADER_BYTES:].view(layout.experts, layout.blocks, gates, layout.panel_bytes)
    panels[..., : starts["words"]].zero_()
    for name, part in weight.parts.items():
        _fill(panels[..., starts[name] : starts[name] + layout.sizes[name]], part, layout)
    return PackedWeight(
        values, weight.shape, gates, form=weight.form, element=weight.dtype, activations=weight.activations
    )


def _shift(groups: int, factors: int) -> int:
    """The logarithm of the number of groups that share a factor."""
    return 62 if factors == 1 else (-(-groups // factors) - 1).bit_length()


def _fill(target: Tensor, rows: Tensor, layout: _Layout) -> None:
    """Copies rows [.., N, width] to the panels [experts, blocks, gates, width * 16] of bytes, outputs last."""
    width, features = rows.shape[-1], rows.shape[-2] // layout.gates
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[rows.itemsize]
    source = rows.contiguous().view(plain).view(layout.experts, layout.gates, features, width)
    panels = target.view(plain).view(*target.shape[:-1], width, PANEL)
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
    header = packed.values[:HEADER_BYTES].clone().view(torch.int64).tolist()
    group, panel_bytes, zeros, words, scale_type, factors, minima, shift = header
    experts = packed.shape[0] if len(packed.shape) == 3 else 1
    features, inner = packed.shape[-2] // packed.gates, packed.shape[-1]
    groups = -(-inner // group)
    supers = -(-groups // 2**shift)
    panels = packed.values[HEADER_BYTES:].view(experts, -1, packed.gates, panel_bytes)

    def rows(first: int, width: int, dtype: torch.dtype) -> Tensor:
        part = panels[..., first : first + width * PANEL * dtype.itemsize].contiguous().view(dtype)
        found = part.view(*part.shape[:-1], -1, PANEL).permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :features]
        return found.reshape(*packed.shape[:-1], -1)

    kind = SCALE_TYPES[scale_type]
    return CodedWeight(
        packed.form,
        packed.shape,
        group if groups > 1 else inner,
        rows(words, -(-inner // DEPTH) * FORMS[packed.form].words, torch.int32),
        rows(0, groups, kind),
        rows(zeros, groups, torch.int8) if zeros else None,
        packed.dtype,
        rows(factors, supers, torch.float16 if kind == torch.int8 else torch.float32) if factors else None,
        rows(minima, supers, torch.float16) if minima else None,
        packed.activations,
    )


def group_of(packed: PackedWeight) -> int:
    """The inputs of a scale of packed codes; of one group, rounded up to a multiple of DEPTH."""
    return int(packed.values[:8].clone().view(torch.int64))


def unpacked(packed: PackedWeight) -> Tensor:
    """An unpacked float copy of a packed weight, as `packing.unpack` makes it."""
    return unpack(packed) if packed.form is None else decoded(unpack_codes(packed), packed.dtype)
