"""Weights of codes for Triton kernels: bytes in which each output has its scales next to its codes.

A row has these parts in this order, each aligned to 4 bytes; those that a weight lacks take no room: scales [groups],
minima f32[groups], zeros i8[groups], a table f32[16] of the values, codes. A row is aligned to 16 bytes.

    bits  byte of input k                          its bits
    8     k                                        all
    4     k // 2                                   4 from 4 * (k % 2) on
    6     k // 2, and k // 4 of a second part      4 as above, and 2 from 2 * (k % 4) on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, GroupScales, codes_of, group_scales, values_of

PART_BYTES, ROW_BYTES = 4, 16
"""Bytes to which parts and rows are aligned."""
TABLE_SIZE = 16
SCALES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Types of scales in rows, and their names in layouts."""


class CodeLayout(NamedTuple):
    """The form of codes and where the parts of a row begin, for which kernels are compiled; -1 for an absent part.

    Scales begin at 0. A value is float8 e4m3 (`is_fp8`), or the table's, or the code minus `center`. `high` is the
    second part of codes of 6 bits.
    """

    bits: int
    center: int
    is_fp8: bool
    group: int
    scales: str
    minima: int
    zeros: int
    table: int
    codes: int
    high: int


class CodedTensor(Tensor):
    """A weight [N, K] or [E, N, K] of codes, which torch sees as its values: an op of torch decodes it first.

    Triton's launchers read `rows`, u8 [..., N, bytes of a row], by `code_layout`.
    """

    rows: Tensor
    code_layout: CodeLayout
    form: str

    @staticmethod
    def __new__(
        cls, shape: torch.Size, dtype: torch.dtype, rows: Tensor, code_layout: CodeLayout, form: str
    ) -> CodedTensor:
        made: CodedTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rows.device)
        made.rows, made.code_layout, made.form = rows, code_layout, form
        return made

    @property
    def num_bytes(self) -> int:
        """The memory that it takes; `nbytes` is that of its values."""
        return self.rows.nbytes

    def decoded(self) -> Tensor:
        """The values, computed in float32 and rounded once."""
        layout, inner = self.code_layout, self.shape[-1]
        scales = self._part(0, next(kind for kind, name in SCALES.items() if name == layout.scales))
        minima, zeros = self._part(layout.minima, torch.float32), self._part(layout.zeros, torch.int8)
        assert scales is not None
        codes = _codes(self.rows, layout, inner)
        values = values_of(codes, FORMS[self.form], layout.group, GroupScales(scales, minima, zeros))
        return values.to(self.dtype)

    def _part(self, start: int, kind: torch.dtype) -> Tensor | None:
        """A part of the rows with one number per group; None for an absent one."""
        if start < 0:
            return None
        groups = -(-self.shape[-1] // self.code_layout.group)
        return self.rows[..., start : start + groups * kind.itemsize].contiguous().view(kind)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        args, kwargs = tree_map_only(CodedTensor, CodedTensor.decoded, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CodedTensor({list(self.shape)}, {self.dtype}, {self.form})"


def coded_tensor(weight: CodedWeight, device: torch.device) -> CodedTensor:
    """The weight in the form of the kernels. Scales with factors are multiplied out, in float32."""
    form, inner = FORMS[weight.form], weight.shape[-1]
    codes = codes_of(weight.words, form, inner)
    scales, minima, zeros = group_scales(weight)
    if scales.dtype not in SCALES:  # powers of two
        scales = scales.float().bfloat16()
    parts: dict[str, Tensor] = {"scales": scales}
    if minima is not None:
        parts["minima"] = minima
    if zeros is not None:
        parts["zeros"] = zeros
    is_fp8 = form.bits == 8 and form.values is not None
    if form.values is not None and not is_fp8:
        parts["table"] = torch.tensor(form.values, dtype=torch.float32, device=codes.device).expand(
            *codes.shape[:-1], TABLE_SIZE
        )
    parts["codes"] = codes if form.bits == 8 else _joined(codes & 15, 4)
    if form.bits == 6:
        parts["high"] = _joined(codes >> 4, 2)
    starts, end = dict.fromkeys(("minima", "zeros", "table", "codes", "high"), -1), 0
    pieces = []
    for name, part in parts.items():
        starts[name] = end
        bytes_of_part = part.contiguous().view(torch.uint8)
        pieces.append(pad(bytes_of_part, (0, -bytes_of_part.shape[-1] % PART_BYTES)))
        end += pieces[-1].shape[-1]
    rows = pad(torch.cat(pieces, -1), (0, -end % ROW_BYTES)).to(device)
    center = form.center if minima is None else 0
    del starts["scales"]
    layout = CodeLayout(form.bits, center, is_fp8, weight.group, SCALES[scales.dtype], **starts)
    return CodedTensor(weight.shape, weight.dtype, rows, layout, weight.form)


def _joined(fields: Tensor, bits: int) -> Tensor:
    """Bytes of fields along the last dim, the first field in the low bits."""
    count = 8 // bits
    padded = pad(fields, (0, -fields.shape[-1] % count))
    runs = padded.view(*padded.shape[:-1], -1, count)
    return (runs << bits * torch.arange(count, dtype=torch.uint8, device=runs.device)).sum(-1, dtype=torch.uint8)


def _fields(joined: Tensor, bits: int, inner: int) -> Tensor:
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=joined.device)
    found: Tensor = joined.unsqueeze(-1) >> shifts & (1 << bits) - 1
    return found.flatten(-2)[..., :inner]


def _codes(rows: Tensor, layout: CodeLayout, inner: int) -> Tensor:
    if layout.bits == 8:
        return rows[..., layout.codes : layout.codes + inner].contiguous()
    low = _fields(rows[..., layout.codes : layout.codes + -(-inner // 2)], 4, inner)
    if layout.bits == 4:
        return low
    return low | _fields(rows[..., layout.high : layout.high + -(-inner // 4)], 2, inner) << 4
