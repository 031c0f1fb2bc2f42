"""Codes of blocks by least squares: the scale of each group, its offset, and the factors of scales in integers.

    q = round((x - m) / s)                                    the nearest codes for a scale and an offset
    (s, m) = argmin sum (x - s q - m)^2                       the linear regression of x on the codes
    (d, c) = argmin sum (x - d t q + c u)^2                   the same for factors of integer scales t and minima u

Each group is tried with ranges of codes around its own range, each followed by a regression, and the one with the least
error is kept. Where scales are integers times a factor of the block, factors and scales are then improved in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import BlockCodes

CHUNK = 2**17
"""Elements that are fitted at a time, with intermediate results that stay in the caches."""
STEP, NUM_BELOW, NUM_ABOVE = 0.25, 3, 8
"""The ranges that are tried: quarters of a code below and above that of all codes."""
NUM_ROUNDS = 2
"""Improvements of factors and scales in turn; a third changes errors by less than 0.1 %."""
LIMIT = 2.0**40
"""Beyond the values of all formats; below it, sums of squares of values times codes are finite."""


class BlockRange(NamedTuple):
    """The least and the largest integer."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class BlockFit:
    """The search of one format with `block_len` numbers in a block."""

    format: BlockCodes
    block_len: int

    def parts(self, values: Tensor) -> dict[str, Tensor] | None:
        """The parts of values f32[N, K]: codes i32[N, K], others with an element per group or block.

        Returns None for values that are not finite, or whose scales are outside of the range of float16.
        """
        if not (values.abs() < LIMIT).all():
            return None
        blocks = values.reshape(-1, self.block_len // self.format.group, self.format.group)
        step = max(1, CHUNK // self.block_len)
        try:
            chunks = [self._fitted(blocks[low : low + step]) for low in range(0, len(blocks), step)]
        except OverflowError:
            return None
        return {name: torch.cat([one[name] for one in chunks]).reshape(len(values), -1) for name in self.format.parts}

    def _fitted(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of blocks [blocks, groups, group]."""
        if "minima" in self.format.parts:
            return self._with_minima(x)
        return self._with_factors(x) if "factors" in self.format.parts else self._of_groups(x)

    def _of_groups(self, x: Tensor) -> dict[str, Tensor]:
        codes = self._range("codes")
        if "offsets" in self.format.parts:
            scales, offsets = map(_half, _affine(x, codes.high, has_minima=False))
            offsets = torch.where(scales == 0, _half(x.mean(-1, keepdim=True)), offsets)
            nearest = _nearest(x - offsets, scales, codes)
            return {"codes": nearest.int(), "scales": scales.half(), "offsets": offsets.half()}
        scales = _half(_symmetric(x, codes))
        return {"codes": _nearest(x, scales, codes).int(), "scales": scales.half()}

    def _with_factors(self, x: Tensor) -> dict[str, Tensor]:
        """x = factor * scale * code, where the extreme scale of a block is the lowest integer."""
        codes, limits = self._range("codes"), self._range("scales")
        found = _symmetric(x, codes)
        factors = _half(_extreme(found, 1) / limits.low)
        for _ in range(NUM_ROUNDS):
            scales = _nearest(found, factors, limits)
            q = _nearest(x, factors * scales, codes)
            products = scales * q
            factors = _half(_ratio(_sum(x * products), _sum(products * products)))
            found = _ratio((x * q).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True))
        scales = _nearest(found, factors, limits)
        q = _nearest(x, factors * scales, codes)
        return {"codes": q.int(), "scales": scales.int(), "factors": factors.half()}

    def _with_minima(self, x: Tensor) -> dict[str, Tensor]:
        """x = factor * scale * code - minimum_factor * minimum, all of which are at least 0."""
        codes, limits, low_limits = self._range("codes"), self._range("scales"), self._range("minima")
        scale, offset = _affine(x, codes.high, has_minima=True)
        factors = _half(scale.amax(1, keepdim=True) / limits.high)
        minimum_factors = _half(-offset.amin(1, keepdim=True) / low_limits.high)
        mean = x.mean(-1, keepdim=True).clamp(max=0)
        for left in range(NUM_ROUNDS, -1, -1):
            scales = _nearest(scale, factors, limits)
            # All numbers of a group with the scale 0 are minus its minimum.
            minima = _nearest(-torch.where(factors * scales == 0, mean, offset), minimum_factors, low_limits)
            q = _nearest(x + minimum_factors * minima, factors * scales, codes)
            if left:
                factors, minimum_factors = _factors(x, scales * q, minima, factors, minimum_factors)
        return {
            "codes": q.int(),
            "scales": scales.int(),
            "factors": factors.half(),
            "minima": minima.int(),
            "minimum_factors": minimum_factors.half(),
        }

    def _range(self, part: str) -> BlockRange:
        return BlockRange(*self.format.ranges[part])


def _limits(high: float) -> Iterator[float]:
    """The ranges of codes that are tried."""
    return (high + STEP * i for i in range(-NUM_BELOW, NUM_ABOVE + 1) if high + STEP * i > 0)


def _symmetric(x: Tensor, codes: BlockRange) -> Tensor:
    """Scales [..., 1] with the least errors of x [..., G] = scale * code; either sign, as codes have one more below.

    With the best scale for its codes, the sum of squared errors is sum x^2 - (sum x q)^2 / sum q^2.
    """
    extreme = _extreme(x, -1)
    best, found = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for limit in (*(-one for one in _limits(-codes.low)), codes.high, codes.high + 0.5):
        q = _nearest(x, extreme / limit, codes)
        xq = (x * q).sum(-1, keepdim=True)
        scale = _ratio(xq, (q * q).sum(-1, keepdim=True))
        is_better = scale * xq > best
        best, found = torch.where(is_better, scale * xq, best), torch.where(is_better, scale, found)
    return found


def _affine(x: Tensor, top: int, *, has_minima: bool) -> tuple[Tensor, Tensor]:
    """Scales and offsets [..., 1] with the least errors of x [..., G] = scale * code + offset, codes from 0 to `top`.

    With `has_minima`, offsets are at most 0.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low = low.clamp(max=0) if has_minima else low
    n, sx = x.shape[-1], x.sum(-1, keepdim=True)
    best, scale, offset = torch.full_like(low, -torch.inf), torch.zeros_like(low), low
    for limit in _limits(top):
        q = _nearest(x - low, (high - low) / limit, BlockRange(0, top))
        sq, qq, xq = (one.sum(-1, keepdim=True) for one in (q, q * q, x * q))
        s = _ratio(n * xq - sx * sq, n * qq - sq * sq)
        m = (sx - s * sq) / n
        if has_minima:
            s, m = torch.where(m > 0, _ratio(xq, qq), s), m.clamp(max=0)
        gain = 2 * (s * xq + m * sx) - (s * s * qq + 2 * s * m * sq + n * m * m)
        is_better = (gain > best) & (s >= 0)
        best, scale, offset = (torch.where(is_better, *pair) for pair in ((gain, best), (s, scale), (m, offset)))
    return scale, offset


def _factors(x: Tensor, u: Tensor, minima: Tensor, d: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of x = d * u - c * minima by least squares over blocks; the given ones if these are not positive."""
    v = minima.expand_as(u)
    uu, uv, vv, xu, xv = map(_sum, (u * u, u * v, v * v, x * u, x * v))
    determinant = uu * vv - uv * uv
    own, minimum = _ratio(xu * vv - xv * uv, determinant), _ratio(xu * uv - xv * uu, determinant)
    is_used = (determinant > 1e-6 * uu * vv) & (own > 0) & (minimum >= 0)
    return _half(torch.where(is_used, own, d)), _half(torch.where(is_used, minimum, c))


def _nearest(x: Tensor, scales: Tensor, codes: BlockRange) -> Tensor:
    """The nearest codes; 0 where the scale is 0, or the code next to it."""
    return (x / torch.where(scales == 0, torch.inf, scales)).round_().clamp_(codes.low, codes.high)


def _extreme(x: Tensor, dim: int) -> Tensor:
    """The element of the largest magnitude along a dim, with its sign."""
    return x.gather(dim, x.abs().argmax(dim, keepdim=True))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient, 0 where the divisor is 0."""
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


def _sum(x: Tensor) -> Tensor:
    """Sums of blocks [blocks, groups, group]."""
    return x.sum((1, 2), keepdim=True)


def _half(x: Tensor) -> Tensor:
    """Rounded to float16, in which files have scales. Raises OverflowError for larger numbers."""
    found = x.half().float()
    if not found.isfinite().all():
        raise OverflowError("the scales are outside of the range of float16")
    return found
