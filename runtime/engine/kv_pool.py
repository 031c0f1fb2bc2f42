"""The memory of a paged KV cache: per layer, one key and one value tensor of fixed-size blocks (Kwon et al. 2023)."""

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sageLLM.runtime.core.model.layout import KvShape

CACHE_LINE = 64


class KVPool:
    """Keys and values [PG, BS, heads, width] for each layer: PG blocks of BS tokens.

    Where the layout keeps values as the leading part of keys, they are views of that memory. With a `folder` the
    memory is a file there, mapped; it has no name any more, so the system takes it back when the process ends.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        shape: KvShape,
        dtype: torch.dtype,
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        def zeros(kept: tuple[int, int]) -> list[torch.Tensor]:
            sizes = (num_blocks, block_size, *kept)
            if folder is not None:
                return [_mapped(folder, sizes, dtype) for _ in range(num_layers)]
            return [_zeros(sizes, dtype, device) for _ in range(num_layers)]

        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shape = shape
        self.keys = zeros(shape.k)
        self.values = [keys[..., : shape.v[1]] for keys in self.keys] if shape.is_shared else zeros(shape.v)

    def like(self, num_blocks: int, device: torch.device, folder: Path | None = None) -> "KVPool":
        """Another pool for the same KV, of `num_blocks` blocks."""
        dtype = self.keys[0].dtype
        return KVPool(self.num_layers, num_blocks, self.block_size, self.shape, dtype, device, folder)

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *(() if self.shape.is_shared else self.values)))

    def layers(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Every layer's number, keys and values."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            yield layer, keys, values

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The caches by the names that graphs use for them."""
        tensors = {}
        for layer, keys, values in self.layers():
            tensors[f"layers.{layer}.k_cache"] = keys
            tensors[f"layers.{layer}.v_cache"] = values
        return tensors


def _zeros(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU the system gives a page of zeros when it is first touched: a pool costs what is used of it."""
    if device.type != "cpu":
        return torch.zeros(sizes, dtype=dtype, device=device)
    num_bytes = math.prod(sizes) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(num_bytes + CACHE_LINE, np.uint8))
    start = -memory.data_ptr() % CACHE_LINE
    return memory[start : start + num_bytes].view(dtype).view(sizes)


def _mapped(folder: Path, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros over a nameless file in the folder. Raises OSError where the disk has no room for it."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="kv-") as file:
        os.posix_fallocate(file.fileno(), 0, math.prod(sizes) * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=math.prod(sizes), dtype=dtype).view(sizes)
