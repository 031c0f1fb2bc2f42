"""Scales and codes of weights: the scale of each group, and the nearest code of each element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sageLLM.runtime.quantize.scheme import Grid, Scheme

CHUNK = 2**20
"""Elements that are rounded at a time: with more, their intermediate results leave the caches."""
F8_LARGEST = 448.0
"""The largest value of float8 e4m3."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes [N, K] as floats, and scales and zeros with an element per group: [N / rows, K / columns]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: Grid

    @property
    def values(self) -> Tensor:
        """The weight [N, K] that they make, in float32."""
        return (self.codes - _spread(self.zeros, self)) * _spread(self.scales, self)


@dataclass(frozen=True, slots=True)
class Rounding:
    """The rounding of a scheme; scales are rounded to the type `dtype` before codes are chosen."""

    scheme: Scheme
    dtype: torch.dtype

    def nearest(self, weight: Tensor) -> Codes:
        """Each element of a weight [N, K] rounded to the nearest code, some rows at a time."""
        grid = self.scheme.grid(tuple(weight.shape))
        step = max(1, CHUNK // weight.shape[1] // grid.rows) * grid.rows
        parts = [self._nearest(weight[start : start + step].float(), grid) for start in range(0, len(weight), step)]
        if len(parts) == 1:
            return parts[0]
        zeros = [one.zeros for one in parts if one.zeros is not None]
        return Codes(
            torch.cat([one.codes for one in parts]),
            torch.cat([one.scales for one in parts]),
            torch.cat(zeros) if zeros else None,
            grid,
        )

    def _nearest(self, weight: Tensor, grid: Grid) -> Codes:
        scales, zeros = self.parameters(weight, grid)
        empty = Codes(weight, scales, zeros, grid)
        codes = self.codes(weight, _spread(scales, empty), _spread(zeros, empty))
        return Codes(codes, scales, zeros, grid)

    def parameters(self, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """The scales of the groups of a weight [N, K], and zeros if the scheme has them: [N / rows, K / columns]."""
        groups = _groups(weight, grid)
        bits, rule = self.scheme.bits, self.scheme.written.rule
        if self.scheme.written.has_zeros:
            low, high = groups.amin((1, 3)).clamp(max=0), groups.amax((1, 3)).clamp(min=0)
            scales = self._stored((high - low) / (2**bits - 1))
            return scales, torch.round(-low / scales.float()).clamp(0, 2**bits - 1)
        largest = groups.abs().amax((1, 3))
        if rule == "largest":
            top = F8_LARGEST if self.scheme.written.kind == "f8" else 2.0 ** (bits - 1) - 1
            return self._stored(largest / top), None
        return self._stored(largest * 2 / (2**bits - 1)), None

    def codes(self, weight: Tensor, scales: Tensor, zeros: Tensor | float) -> Tensor:
        """The nearest codes of elements with these scales and zeros."""
        bits = self.scheme.bits
        if self.scheme.written.kind == "f8":
            return (weight / scales.float()).clamp(-F8_LARGEST, F8_LARGEST).to(torch.float8_e4m3fn).float()
        low = 0 if self.scheme.written.has_zeros else -(2 ** (bits - 1))
        return (torch.round(weight / scales.float()) + zeros).clamp(low, low + 2**bits - 1)

    def _stored(self, scales: Tensor) -> Tensor:
        """Scales in the type that is stored; 1 for groups of zeros."""
        found = scales.to(self.dtype)
        return torch.where(found == 0, torch.ones_like(found), found)


def _groups(weight: Tensor, grid: Grid) -> Tensor:
    """[N / rows, rows, K / columns, columns], padded with zeros."""
    rows, width = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -width % grid.columns, 0, -rows % grid.rows))
    return padded.reshape(-1, grid.rows, padded.shape[1] // grid.columns, grid.columns)


def _spread(part: Tensor | None, of: Codes) -> Tensor:
    """An element for each code."""
    rows, width = of.codes.shape
    if part is None:
        return torch.zeros(())
    found = part.float() if part.dtype != torch.float32 else part
    if of.grid.rows > 1:
        found = found.repeat_interleave(of.grid.rows, 0)[:rows]
    return found.repeat_interleave(of.grid.columns, 1)[:, :width]
