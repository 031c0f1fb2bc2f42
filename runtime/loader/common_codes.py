"""Brings the parts of a fused weight to one form of codes: numbers are moved and repeated, never rounded.

GGUF files often have q and k in Q4_K and v in Q6_K. The smallest form that holds all of them has the most bits and the
smallest groups of any:

    more bits           codes keep their distance to the center
    smaller groups      scales, zeros and minima are repeated
    minima              (code - center) * scale * factor = code * scale * factor - scale * (center * factor)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, Form, codes_of, words_of


def with_common_codes(parts: Sequence[CodedWeight]) -> list[CodedWeight] | None:
    """The parts with the same form, groups and kinds of scales and minima; None if they cannot be moved exactly."""
    if len({_kind(one) for one in parts}) == 1:
        return list(parts)
    if any(FORMS[one.form].values is not None for one in parts):
        return None
    target = _Target(
        max((FORMS[one.form] for one in parts), key=lambda form: form.bits),
        min(one.group for one in parts),
        any(one.minima is not None for one in parts),
    )
    found = [target.of(one) for one in parts]
    moved = [one for one in found if one is not None]
    return moved if len(moved) == len(parts) and len({_kind(one) for one in moved}) == 1 else None


def _kind(weight: CodedWeight) -> tuple[object, ...]:
    """The facts that parts of a weight must share. Scales of several float types become float32."""
    kind = weight.scales.dtype if weight.factors is not None else None
    factors = () if weight.factors is None else (weight.factors.shape[-1],)
    return weight.form, weight.group, kind, factors, weight.minima is None


@dataclass(frozen=True, slots=True)
class _Target:
    form: Form
    group: int
    has_minima: bool

    def of(self, weight: CodedWeight) -> CodedWeight | None:
        """The weight in this form, or None if a number would be rounded."""
        if weight.group % self.group:
            return None
        if self.has_minima and weight.minima is None:
            with_minima = _with_minima(weight)
            if with_minima is None:
                return None
            weight = with_minima
        form, inner = FORMS[weight.form], weight.shape[-1]
        codes = codes_of(weight.words, form, inner)
        if not self.has_minima:
            codes = codes + (self.form.center - form.center)
        return replace(
            weight,
            form=self.form.name,
            group=self.group,
            words=words_of(codes, self.form),
            scales=self._repeated(weight.scales, weight),
            zeros=None if weight.zeros is None else self._repeated(weight.zeros, weight),
        )

    def _repeated(self, x: Tensor, weight: CodedWeight) -> Tensor:
        """An element for each of the smaller groups."""
        count = -(-weight.shape[-1] // self.group)
        return x.repeat_interleave(weight.group // self.group, -1)[..., :count]


def _with_minima(weight: CodedWeight) -> CodedWeight | None:
    """The center of the codes as a minimum; None for scales without factors, with divisors, and with zeros."""
    if weight.factors is None or weight.scales.dtype != torch.int8 or weight.zeros is not None:
        return None
    minima = (weight.factors.float() * FORMS[weight.form].center).half()
    if not torch.equal(minima.float(), weight.factors.float() * FORMS[weight.form].center):
        return None
    return replace(weight, zeros=weight.scales, minima=minima)
