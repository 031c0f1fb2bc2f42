"""The memory in which a worker's plans keep what they compute: one block, which grows; one step uses it at a time."""

from math import prod

import torch
from torch import Tensor

POISON = 0xFF
"""This byte everywhere is NaN in every float type, and -1 in every integer type."""


class Arena:
    """Growing moves the memory: plans compare `address` with the one that they have written into their calls."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def address(self) -> int:
        return self._bytes.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self._bytes.numel()

    def reserve(self, num_bytes: int) -> None:
        """Makes the memory at least so large; what was in it is lost."""
        if num_bytes > self.num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)

    def view(self, start: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A tensor over the memory that begins at byte `start`."""
        return (
            self._bytes[start:].view(dtype).as_strided(shape, strides)
            if prod(shape)
            else torch.empty(shape, dtype=dtype)
        )

    def poison(self, start: int, num_bytes: int) -> None:
        """Fills a part with what shows in any result that it gets into."""
        self._bytes[start : start + num_bytes] = POISON
