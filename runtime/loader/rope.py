"""Cos and sin of rotary position embeddings (RoPE, arXiv 2104.09864), with the scalings of checkpoints.

    angle[p, j] = p * frequency[j],   frequency[j] = base ** (-2j / dim),   j < dim / 2

A scaling changes the frequencies, and may multiply both tables by one factor. Everything is computed in float32, as in
the training code of the checkpoints: more exact angles would change the logits at large positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.core.model.rope import RopeSpec
from sageLLM.runtime.errors import CheckpointError

Scaling = Mapping[str, Any]
"""The parameters of a scaling, as `read_rope` has checked them."""
Length = int | Tensor
"""The length of a sequence in tokens, or i64[N] with one length per position."""


class RopeRows(NamedTuple):
    """cos f32[N, dim/2] and sin f32[N, dim/2] of N positions."""

    cos: Tensor
    sin: Tensor


class _Frequencies(NamedTuple):
    """Radians per position, f32[dim/2] or f32[N, dim/2], and the factor on both tables."""

    radians: Tensor
    factor: float = 1.0


def rope_rows(rope: RopeSpec, positions_N: Tensor, length: Length) -> RopeRows:
    """The rows of these positions of a sequence of `length` tokens.

    Raises CheckpointError for a scaling with frequencies that are not finite.
    """
    frequencies = _frequencies(rope, length)
    angles = positions_N.to(torch.float32)[:, None] * frequencies.radians
    return RopeRows(angles.cos() * frequencies.factor, angles.sin() * frequencies.factor)


def _frequencies(rope: RopeSpec, length: Length) -> _Frequencies:
    try:
        frequencies = _SCALINGS[rope.kind](rope, rope.scaling or {}, length)
    except (ArithmeticError, ValueError, RuntimeError):
        raise CheckpointError(_no_frequencies(rope.kind, rope.base)) from None
    if not (frequencies.radians.isfinite().all() and math.isfinite(frequencies.factor)):
        raise CheckpointError(_no_frequencies(rope.kind, rope.base))
    return frequencies


def _no_frequencies(name: str, base: float) -> str:
    return f"the parameters of rope scaling '{name}' with base {base:g} must produce finite frequencies"


def _exponents(rope: RopeSpec) -> Tensor:
    return torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim


def _plain(rope: RopeSpec) -> Tensor:
    return 1.0 / rope.base ** _exponents(rope)


def _default(rope: RopeSpec, scaling: Scaling, length: Length) -> _Frequencies:
    return _Frequencies(_plain(rope))


def _linear(rope: RopeSpec, scaling: Scaling, length: Length) -> _Frequencies:
    """Position interpolation (arXiv 2306.15595): positions are divided by the factor."""
    return _Frequencies(_plain(rope) / scaling["factor"])


def _dynamic(rope: RopeSpec, scaling: Scaling, length: Length) -> _Frequencies:
    """Dynamic NTK: unscaled up to the trained length; beyond it the base grows with the length of the sequence."""
    if isinstance(length, int) and length <= rope.trained:
        return _Frequencies(_plain(rope))
    # In float32, as transformers does with its length in a tensor.
    lengths = torch.as_tensor(length, dtype=torch.int64)
    factor = scaling["factor"]
    growth = factor * lengths / rope.trained - (factor - 1)
    bases = rope.base * growth ** (rope.dim / (rope.dim - 2))
    return _Frequencies(1.0 / bases[..., None] ** _exponents(rope))


def _ntk_alpha(rope: RopeSpec, scaling: Scaling, length: Length) -> _Frequencies:
    """NTK-aware scaling with a fixed alpha, as in Hunyuan: a larger base at every length."""
    base = rope.base * scaling["alpha"] ** (rope.dim / (rope.dim - 2))
    return _Frequencies(_plain(replace(rope, base=base)))


def _llama3(rope: RopeSpec, scaling: Scaling, length: Length) -> _Frequencies:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, those between are interpolated."""
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    radians = _plain(rope)
    turns = original * radians / (2 * math.pi)  # full turns of each frequency within the trained length
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return _Frequencies((1 - blend) * radians / factor + blend * radians)


def _yarn(rope: RopeSpec, scaling: Scaling, length: Length) -> _Frequencies:
    """YaRN (arXiv 2309.00071): interpolates like llama3, by a ramp over the dims, and scales the attention logits.

    The scale is applied as a factor on both tables, that is, its square on the logits.
    """
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings", rope.max_position)
    fast, slow = scaling.get("beta_fast", 32.0), scaling.get("beta_slow", 1.0)

    def dim_of(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    # dim_of inverts frequency[j]: the dim that makes `turns` full turns within the original length.
    first, last = dim_of(fast), dim_of(slow)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
    slowed = ramp.clamp(0.0, 1.0)
    radians = _plain(rope)
    return _Frequencies(radians / factor * slowed + radians * (1 - slowed), _yarn_factor(scaling, factor))


def _yarn_factor(scaling: Scaling, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


def _longrope(rope: RopeSpec, scaling: Scaling, length: Length) -> _Frequencies:
    """LongRoPE (arXiv 2402.13753): one factor per dim, from the long set for sequences beyond the trained length."""
    kind = "long" if length > rope.trained else "short"
    factors = torch.tensor(scaling[f"{kind}_factor"], dtype=torch.float32)
    original = scaling.get("original_max_position_embeddings", rope.max_position)
    stretch = scaling.get("factor", rope.max_position / original)
    default = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    radians = 1.0 / (factors * rope.base ** _exponents(rope))
    return _Frequencies(radians, scaling.get(f"{kind}_mscale", scaling.get("attention_factor", default)))


def _proportional(rope: RopeSpec, scaling: Scaling, length: Length) -> _Frequencies:
    """Gemma 4: tables over the whole head; only the highest frequencies rotate, and the others are 0."""
    num_rotated = int(scaling.get("partial_rotary_factor", 1.0) * rope.dim // 2)
    radians = _plain(rope) / scaling.get("factor", 1.0)
    radians[num_rotated:] = 0.0
    return _Frequencies(radians)


_SCALINGS: dict[str, Callable[[RopeSpec, Scaling, Length], _Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "ntk_alpha": _ntk_alpha,
    "yarn": _yarn,
    "longrope": _longrope,
    "longrope_mscale": _longrope,
    "proportional": _proportional,
    "su": _longrope,  # the original name, in early checkpoints of Phi-3
}
