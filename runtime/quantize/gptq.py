"""Rounds a weight column by column, and lets later columns compensate the errors of earlier ones (GPTQ).

Codes are sought with which the layer outputs `w x` differ least for the calibration inputs x: after column k is
rounded, the error is distributed over the columns after it by the inverse of the Hessian `H = X X^T` (Frantar et al.,
arXiv 2210.17323, algorithm 1). All of it is computed in float32, with H in the order of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.quantize.rounding import Codes, Rounding
from sageLLM.runtime.quantize.scheme import Grid

BLOCK = 128
"""Columns between two products that apply their errors to the columns after them."""
DAMPING = 0.01
"""The part of the mean of the diagonal that is added to it."""
MAX_DAMPINGS = 4
"""Attempts with ten times the damping of the one before, for a Hessian that is not positive definite."""


class Hessian:
    """The sum of x x^T over calibration inputs, float32 [K, K]."""

    def __init__(self, width: int) -> None:
        self.sum = torch.zeros(width, width)
        self.num_rows = 0

    def add(self, x_TK: Tensor) -> None:
        """Adds the inputs of T tokens."""
        x = x_TK.float()
        self.sum.addmm_(x.T, x)
        self.num_rows += x.shape[0]


def compensated(weight: Tensor, hessian: Hessian, rounding: Rounding, name: str) -> Codes:
    """The codes of a weight [N, K] with compensated errors.

    Raises CheckpointError, with the `name`, for inputs that are not finite.
    """
    grid = rounding.scheme.grid(tuple(weight.shape))
    weight = weight.float().clone()
    inverse = _inverse_root(hessian.sum, name)
    codes = torch.empty_like(weight)
    parts: list[tuple[Tensor, Tensor | None]] = []
    width = weight.shape[1]
    for first in range(0, width, BLOCK):
        end = min(first + BLOCK, width)
        block, own = weight[:, first:end], inverse[first:end, first:end]
        errors = torch.empty_like(block)
        for k in range(end - first):
            if (first + k) % grid.columns == 0:
                parts.append(_group(weight, first + k, grid, rounding))
            scales, zeros = (_column(one, weight.shape[0], grid) for one in parts[-1])
            column = rounding.codes(block[:, k], scales, zeros)
            codes[:, first + k] = column
            errors[:, k] = (block[:, k] - (column - zeros) * scales.float()) / own[k, k]
            block[:, k:] -= errors[:, k, None] * own[k, k:]
        weight[:, end:] -= errors @ inverse[first:end, end:]
    all_zeros = [one for _, one in parts if one is not None]
    return Codes(codes, torch.cat([one for one, _ in parts], 1), torch.cat(all_zeros, 1) if all_zeros else None, grid)


def output_error(weight: Tensor, codes: Codes, hessian: Hessian) -> float:
    """The sum of squared differences of the outputs `w x` over the calibration inputs, relative to their squares.

    0 if all outputs are 0, such as those of an expert that no token has reached.
    """
    weight = weight.float()
    error = codes.values - weight
    squares = float(((weight @ hessian.sum) * weight).sum())
    return float(((error @ hessian.sum) * error).sum()) / squares if squares > 0 else 0.0


def _group(weight: Tensor, first: int, grid: Grid, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of the group of columns that begins here, compensated so far."""
    return rounding.parameters(weight[:, first : first + grid.columns], grid)


def _column(part: Tensor | None, rows: int, grid: Grid) -> Tensor:
    """An element for each row, from one per `grid.rows` rows."""
    if part is None:
        return torch.zeros(())
    return part[:, 0].repeat_interleave(grid.rows)[:rows] if grid.rows > 1 else part[:, 0]


def _inverse_root(hessian: Tensor, name: str) -> Tensor:
    """The upper triangular R with R^T R = H^-1, of the damped Hessian."""
    if not bool(torch.isfinite(hessian).all()):
        raise CheckpointError(f"the inputs of {name} for the calibration text must be finite, got NaN or infinity")
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    for attempt in range(MAX_DAMPINGS):
        damped = hessian.clone()
        damped.diagonal().add_(DAMPING * 10**attempt * mean)
        root, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            found, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if int(info) == 0:
                inverse: Tensor = found
                return inverse
    raise CheckpointError(f"the inputs of {name} must not depend on each other; use a longer calibration text")
