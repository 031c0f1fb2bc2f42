"""The tables that a layout reads beside its weights: rotary cos and sin by name, and ALiBi's slopes."""

import math
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.loader.rope import rope_tables


def make_tables(config: Any, num_positions: int) -> dict[str, Tensor]:
    """Every table by the name that graphs use, for sequences of up to `num_positions` tokens.

    Raises CheckpointError for a rotary scaling that cannot be computed.
    """
    tables: dict[str, Tensor] = {}
    for name, rope in config.rope.items():
        suffix = f"_{name}" if name else ""
        made = rope_tables(rope, num_positions)
        tables |= {f"cos{suffix}": made.cos, f"sin{suffix}": made.sin}
    if config.alibi is not None:
        slopes = alibi_slopes(config.alibi.heads, config.alibi.max_bias)
        tables["slopes"] = slopes.chunk(config.tp)[config.rank]
    return tables


def alibi_slopes(num_heads: int, max_bias: float) -> Tensor:
    """f32[num_heads]: 2 ** (-max_bias * k / n) for k = 1 .. n, where n is a power of two (Press et al. 2021).

    Of another number of heads, the first n (the power of two below) have these slopes, and the others every second one
    of those for 2n heads.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-max_bias * k / n) for k in range(1, n + 1)]
    between = [2.0 ** (-max_bias * k / (2 * n)) for k in range(1, 2 * (num_heads - n), 2)]
    return torch.tensor(first + between, dtype=torch.float32)
