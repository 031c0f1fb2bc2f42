"""Constant tables of a layout: cos and sin of rotary embeddings by name, and ALiBi slopes."""

import math
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.rope import rope_tables

MAX_TABLE_BYTES = 768 * 2**20
"""A bound on the rope tables, which are computed for all positions. A million positions of a head of 128 use half."""


def make_tables(config: Any, num_positions: int) -> dict[str, Tensor]:
    """Every table by its name in graphs, for sequences of up to `num_positions` tokens.

    Raises CheckpointError for a rope scaling that cannot be computed, and for tables that are too large.
    """
    tables: dict[str, Tensor] = {}
    num_bytes = sum(4 * num_positions * rope.dim for rope in config.rope.values())  # cos and sin, half of the dims each
    if num_bytes > MAX_TABLE_BYTES:
        raise CheckpointError(
            f"the rope tables of {num_positions} positions must have at most {MAX_TABLE_BYTES >> 20} MiB, "
            f"got {num_bytes >> 20}; pass a lower max_model_len"
        )
    for name, rope in config.rope.items():
        suffix = f"_{name}" if name else ""
        made = rope_tables(rope, num_positions)
        tables |= {f"cos{suffix}": made.cos, f"sin{suffix}": made.sin}
    if config.alibi is not None:
        # Slopes depend on the number of heads of the whole model; a rank has a contiguous part of the heads.
        slopes = alibi_slopes(config.alibi.heads, config.alibi.max_bias)
        tables["slopes"] = slopes.chunk(config.tp)[config.rank]
    return tables


def alibi_slopes(num_heads: int, max_bias: float) -> Tensor:
    """ALiBi slopes f32[num_heads]: 2 ** (-max_bias * k / n) for k = 1 .. n, for n = 2^m heads (arXiv 2108.12409).

    For other numbers of heads, n is the next lower power of two: the first n heads have these slopes, and the others
    have every second slope of 2n heads.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-max_bias * k / n) for k in range(1, n + 1)]
    between = [2.0 ** (-max_bias * k / (2 * n)) for k in range(1, 2 * (num_heads - n), 2)]
    return torch.tensor(first + between, dtype=torch.float32)
