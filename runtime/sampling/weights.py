"""Weights of tokens that add up exactly, and draws from them.

A weight is exp(logit - highest) in units of 2**-34, rounded to an integer. Sums of such float32 weights are exact in
float64, for up to 2**19 tokens: in any order, and divided in any way among ranks, they are the same number.

Dimensions in names: R rows, V tokens, C entries of a cumulative sum.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

UNITS = 2.0**34
"""The weight of the likeliest token; less than half a unit is rounded to zero."""

DRAW_BLOCK_LEN = 256
"""Tokens per block of the two-level search in `find_above`."""


def weigh(below_highest: Tensor) -> Tensor:
    """The weights f32 of logits from which the highest one of their row has been subtracted."""
    return below_highest.exp().mul_(UNITS).round_()


def total_of(weights_RV: Tensor) -> Tensor:
    """The sum of each row, f64[R, 1]."""
    return weights_RV.sum(dim=-1, keepdim=True, dtype=torch.float64)


def invert_cdf(weights_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """The first token of each row with a cumulative weight above uniform * total, i64[R]."""
    cdf_of_blocks, blocks = _blocks(weights_RV)
    return _find(cdf_of_blocks, blocks, uniforms_R.unsqueeze(1) * cdf_of_blocks[:, -1:], weights_RV.shape[1])


def find_above(weights_RV: Tensor, target_R1: Tensor) -> Tensor:
    """The first token of each row with a cumulative weight above the target, i64[R], or the last one with a weight."""
    return _find(*_blocks(weights_RV), target_R1, weights_RV.shape[1])


def first_above(cdf_RC: Tensor, target_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The first index with cdf > target, i64[R], and the sum before it, f64[R, 1]."""
    # The target is kept just below the total: rounding could otherwise step past the last entry with any weight.
    total = cdf_RC[:, -1:]
    target = torch.minimum(target_R1, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cdf_RC, target, right=True).clamp_(max=cdf_RC.shape[1] - 1)
    before = cdf_RC.gather(1, (index - 1).clamp(min=0)).masked_fill(index == 0, 0.0)
    return index.squeeze(1), before


def _blocks(weights_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The cumulative sums of blocks, because one over a whole row is slow, and the blocks [R, ., DRAW_BLOCK_LEN]."""
    num_rows, num_tokens = weights_RV.shape
    blocks = pad(weights_RV, (0, -num_tokens % DRAW_BLOCK_LEN)).view(num_rows, -1, DRAW_BLOCK_LEN)
    return blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1), blocks


def _find(cdf_of_blocks: Tensor, blocks: Tensor, target_R1: Tensor, num_tokens: int) -> Tensor:
    block, before = first_above(cdf_of_blocks, target_R1)
    rows = torch.arange(len(blocks), device=blocks.device)
    cdf_in_block = blocks[rows, block].double().cumsum(dim=-1)
    token, _ = first_above(cdf_in_block, target_R1 - before)
    return (block * DRAW_BLOCK_LEN + token).clamp_(max=num_tokens - 1)
