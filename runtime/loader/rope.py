"""Cos and sin tables of rotary position embeddings (RoPE, arXiv 2104.09864), with the scalings of checkpoints.

    angle[p, j] = p * frequency[j],   frequency[j] = base ** (-2j / dim),   j < dim / 2

A scaling changes the frequencies, and may multiply both tables by one factor. Everything is computed in float32, as in
the training code of the checkpoints: more exact angles would change the logits at large positions.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.model.layout import RopeSpec
from sageLLM.runtime.errors import CheckpointError


class RopeTables(NamedTuple):
    """cos f32[P, dim/2] and sin f32[P, dim/2] of positions 0 .. P-1."""

    cos: torch.Tensor
    sin: torch.Tensor


class _Frequencies(NamedTuple):
    """Radians per position, f32[dim/2], and the factor on both tables."""

    radians: torch.Tensor
    factor: float = 1.0


def rope_tables(rope: RopeSpec, num_positions: int) -> RopeTables:
    """The tables for a model that serves sequences of up to `num_positions` tokens.

    Raises CheckpointError for a scaling that is unknown, lacks a parameter, or does not support that length.
    """
    scaling = rope.scaling or {}
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name not in _SCALINGS:
        raise CheckpointError(f"the rope scaling must be one of {', '.join(sorted(_SCALINGS))}, got '{name}'")
    try:
        frequencies = _SCALINGS[name](rope, _Parameters(name, scaling), num_positions)
    except (ArithmeticError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_no_frequencies(name, rope.base)) from None
    if not (frequencies.radians.isfinite().all() and math.isfinite(frequencies.factor)):
        raise CheckpointError(_no_frequencies(name, rope.base))
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies.radians)
    return RopeTables(angles.cos() * frequencies.factor, angles.sin() * frequencies.factor)


def _no_frequencies(name: str, base: float) -> str:
    return f"the parameters of rope scaling '{name}' with base {base:g} must produce finite frequencies"


class _Parameters:
    """Reads the numeric parameters of a scaling. Raises CheckpointError with the name of an invalid one."""

    def __init__(self, scaling_name: str, values: Mapping[str, Any]) -> None:
        self.scaling_name = scaling_name
        self.values = values

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if not _is_positive(value):
            raise CheckpointError(
                f"'{key}' of rope scaling '{self.scaling_name}' must be a positive number, got {_got(value)}"
            )
        return float(value)

    def numbers(self, key: str, length: int) -> list[float]:
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != length:
            raise CheckpointError(
                f"'{key}' of rope scaling '{self.scaling_name}' must be a list of {length} numbers, got "
                + (f"{len(values)}" if isinstance(values, list) else _got(values))
            )
        for index, value in enumerate(values):
            if not _is_positive(value):
                raise CheckpointError(
                    f"{key}[{index}] of rope scaling '{self.scaling_name}' must be a positive number, got {_got(value)}"
                )
        return [float(value) for value in values]


def _is_positive(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _got(value: object) -> str:
    return "nothing" if value is None else shown(value)


def _plain(rope: RopeSpec) -> torch.Tensor:
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    return 1.0 / rope.base**exponents


def _default(rope: RopeSpec, parameters: _Parameters, num_positions: int) -> _Frequencies:
    return _Frequencies(_plain(rope))


def _linear(rope: RopeSpec, parameters: _Parameters, num_positions: int) -> _Frequencies:
    """Position interpolation (arXiv 2306.15595): positions are divided by the factor."""
    return _Frequencies(_plain(rope) / parameters.number("factor"))


def _dynamic(rope: RopeSpec, parameters: _Parameters, num_positions: int) -> _Frequencies:
    """Dynamic NTK: unscaled within the trained length.

    Beyond it the frequencies change with every new length, so all cached keys would have to be rotated again. A paged
    cache does not do that, so longer sequences are rejected.
    """
    if num_positions > rope.max_position:
        raise CheckpointError(
            f"rope scaling 'dynamic' supports at most {rope.max_position} positions, got {num_positions}; "
            "lower max_model_len"
        )
    return _Frequencies(_plain(rope))


def _llama3(rope: RopeSpec, parameters: _Parameters, num_positions: int) -> _Frequencies:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, those between are interpolated."""
    factor = parameters.number("factor")
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    original = parameters.number("original_max_position_embeddings")
    radians = _plain(rope)
    turns = original * radians / (2 * math.pi)  # full turns of each frequency within the trained length
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return _Frequencies((1 - blend) * radians / factor + blend * radians)


def _yarn(rope: RopeSpec, parameters: _Parameters, num_positions: int) -> _Frequencies:
    """YaRN (arXiv 2309.00071): interpolates like llama3, by a ramp over the dims, and scales the attention logits.

    The scale is applied as a factor on both tables, that is, its square on the logits.
    """
    factor = parameters.number("factor")
    original = parameters.number("original_max_position_embeddings", rope.max_position)
    fast, slow = parameters.number("beta_fast", 32.0), parameters.number("beta_slow", 1.0)

    def dim_of(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    # dim_of inverts frequency[j]: the dim that makes `turns` full turns within the original length.
    first, last = dim_of(fast), dim_of(slow)
    if parameters.values.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
    slowed = ramp.clamp(0.0, 1.0)
    radians = _plain(rope)
    return _Frequencies(radians / factor * slowed + radians * (1 - slowed), _yarn_factor(parameters, factor))


def _yarn_factor(parameters: _Parameters, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if parameters.values.get("attention_factor") is not None:
        return parameters.number("attention_factor")
    if parameters.values.get("mscale") and parameters.values.get("mscale_all_dim"):
        return magnitude(parameters.number("mscale")) / magnitude(parameters.number("mscale_all_dim"))
    return magnitude(1.0)


def _longrope(rope: RopeSpec, parameters: _Parameters, num_positions: int) -> _Frequencies:
    """LongRoPE (arXiv 2402.13753): one factor per dim, from the long set if sequences can exceed the trained length.

    One set applies to all sequences of an engine, because the rotation of cached keys cannot change.
    """
    original = parameters.number("original_max_position_embeddings", rope.max_position)
    key = "long_factor" if num_positions > original else "short_factor"
    factors = torch.tensor(parameters.numbers(key, rope.dim // 2), dtype=torch.float32)
    stretch = parameters.number("factor", rope.max_position / original)
    default = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return _Frequencies(_plain(rope) / factors, parameters.number("attention_factor", default))


def _proportional(rope: RopeSpec, parameters: _Parameters, num_positions: int) -> _Frequencies:
    """Gemma 4: tables over the whole head; only the highest frequencies rotate, and the others are 0."""
    num_rotated = int(parameters.number("partial_rotary_factor", 1.0) * rope.dim // 2)
    radians = _plain(rope) / parameters.number("factor", 1.0)
    radians[num_rotated:] = 0.0
    return _Frequencies(radians)


_SCALINGS: dict[str, Callable[[RopeSpec, _Parameters, int], _Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
    "su": _longrope,  # the original name, in early checkpoints of Phi-3
}
