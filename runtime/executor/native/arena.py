"""Memory of a worker's intermediate tensors: one growing allocation, used by one step at a time."""

from math import prod

import torch
from torch import Tensor

POISON = 0xFF
"""A fill byte that reads as NaN in every float type and as -1 in every integer type."""


class Arena:
    """One allocation shared by all plans of a worker, which run one after another.

    Growing allocates a new block, so every address into the old one is stale. A plan therefore compares `address` with
    the address that it has written into its calls, and writes them again when the two differ.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def address(self) -> int:
        return self._bytes.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self._bytes.numel()

    def reserve(self, num_bytes: int) -> None:
        """Grows the memory to at least `num_bytes`. The contents are not kept: no value outlives its step."""
        if num_bytes > self.num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)

    def view(self, start: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A tensor over the memory from byte `start` on."""
        return (
            self._bytes[start:].view(dtype).as_strided(shape, strides)
            if prod(shape)
            else torch.empty(shape, dtype=dtype)
        )

    def poison(self, start: int, num_bytes: int) -> None:
        """Fills a range with NaN, which then shows in any result computed from it."""
        self._bytes[start : start + num_bytes] = POISON
