"""Memory of a paged KV cache: one key and one value tensor of fixed-size blocks per layer (arXiv 2309.06180)."""

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sageLLM.runtime.core.model.layout import KvShape
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.execution_graph.kv_loads import lower_name
from sageLLM.runtime.executor import red_zones
from sageLLM.runtime.kv.copies import Tier
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.transport.shards import PoolShape, map_pool
from sageLLM.runtime.worker.staging import NUM_BUFFERS, staged_caches

CACHE_LINE = 64
"""Alignment of a pool in bytes, so that vector loads of keys and values do not straddle cache lines."""


class LowerTier(NamedTuple):
    """The tier below the device: its number of blocks, and the folder of its file (None: host memory)."""

    num_blocks: int
    folder: Path | None = None


class KVPool:
    """Keys and values [PG, BS, heads, width] of each layer, from `first_layer` on: PG blocks of BS tokens.

    In a form of codes the widths include the scales (`runtime/core/model/kv_form.py`), and copies move both.

    If the layout stores values as the leading part of keys, they are views of the keys' memory. With a `folder` the
    memory is an unlinked file there, mapped into the process: the system frees it when the process ends, however it
    ends.

    With `memory`, a descriptor, the tensors lie in memory that other processes map too (`PoolShape`).

    With a `lower` pool, block i of it is block PG + i here: the blocks after the first PG of each layer are staging
    memory, into which a step loads the lower blocks that it reads, layer by layer.
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
        first_layer: int = 0,
        lower: "KVPool | None" = None,
        memory: int | None = None,
    ) -> None:
        def zeros(kept: tuple[int, int]) -> list[torch.Tensor]:
            sizes = (num_blocks, block_size, *kept)
            if lower is not None:
                return staged_caches(num_layers, num_blocks, lower.num_blocks, sizes[1:], dtype)
            if folder is not None:
                return [_mapped(folder, sizes, dtype) for _ in range(num_layers)]
            if red_zones.is_enabled():
                return [red_zones.guarded(sizes, dtype, device, fill=0) for _ in range(num_layers)]
            return [_zeros(sizes, dtype, device) for _ in range(num_layers)]

        self.num_layers, self.first_layer = num_layers, first_layer
        self.num_device_blocks = num_blocks
        self.num_blocks: int = num_blocks + (0 if lower is None else lower.num_blocks)
        self.lower = lower
        self.lower_tier: Tier = "host" if lower is None or lower.folder is None else "disk"
        self.folder: Path | None = folder
        self.block_size = block_size
        self.shape = shape
        if memory is None:
            self.keys = zeros(shape.k)
            self.values = [] if shape.is_shared else zeros(shape.v)
        else:
            mapped = PoolShape(num_layers, num_blocks, block_size, shape.k, None if shape.is_shared else shape.v)
            self.keys, self.values = map_pool(memory, mapped, dtype)
        if shape.is_shared:
            self.values = [keys[..., : shape.v[1]] for keys in self.keys]

    def like(self, num_blocks: int, device: torch.device, folder: Path | None = None) -> "KVPool":
        """A new pool of `num_blocks` blocks with this pool's layers, block size, shape and element type."""
        dtype = self.keys[0].dtype
        first = self.first_layer
        return KVPool(self.num_layers, num_blocks, self.block_size, self.shape, dtype, device, folder, first)

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def staging_bytes(self) -> int:
        """The bytes of the staging memory, which the layers share."""
        if self.lower is None:
            return 0
        return NUM_BUFFERS * (self.lower.num_bytes // self.num_layers)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *(() if self.shape.is_shared else self.values)))

    def layers(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields the number, the keys and the values of every layer."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True), start=self.first_layer):
            yield layer, keys, values

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The caches by their names in graphs."""
        tensors = {}
        for layer, keys, values in self.layers():
            tensors[f"layers.{layer}.k_cache"] = keys
            tensors[f"layers.{layer}.v_cache"] = values
        if self.lower is not None:
            tensors |= {lower_name(name): tensor for name, tensor in self.lower.named_tensors().items()}
        return tensors


def make_pool(
    model: Model, num_blocks: int, block_size: int, lower: LowerTier | None = None, memory: int | None = None
) -> KVPool:
    """An empty pool for the model's KV, on the model's device, with a pool in the tier below, or in shared memory.

    Raises SageError if it does not fit the memory.
    """
    shape, layers = model.kv_entry, model.layers

    def pool(size: int, device: torch.device, folder: Path | None = None, lower: KVPool | None = None) -> KVPool:
        file = memory if folder is None else None
        return KVPool(len(layers), size, block_size, shape, model.kv_dtype, device, folder, layers.start, lower, file)

    try:
        below = None if lower is None else pool(lower.num_blocks, torch.device("cpu"), lower.folder)
        return pool(num_blocks, model.device, lower=below)
    except (MemoryError, torch.OutOfMemoryError):
        gib = len(layers) * num_blocks * block_size * shape.num_elements * model.kv_dtype.itemsize / 2**30
        raise SageError(
            f"the KV cache of {num_blocks} blocks of {block_size} tokens must fit in memory, got {gib:.1f} GiB; "
            f"lower num_kv_blocks, or max_model_len={model.max_model_len}"
        ) from None


def _zeros(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros; on the CPU its pages are allocated on first use.

    NumPy's zeros come from calloc, which maps zero pages lazily, so a pool occupies only the memory that is in use.
    torch.zeros writes every page.
    """
    if device.type != "cpu":
        return torch.zeros(sizes, dtype=dtype, device=device)
    num_bytes = math.prod(sizes) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(num_bytes + CACHE_LINE, np.uint8))
    start = -memory.data_ptr() % CACHE_LINE
    return memory[start : start + num_bytes].view(dtype).view(sizes)


def _mapped(folder: Path, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros over an unlinked file in the folder. Raises OSError if the disk has too little room."""
    # The mapping keeps the file alive after its name is removed. posix_fallocate reserves the room now: with a sparse
    # file a full disk would show as SIGBUS in the middle of a copy.
    with tempfile.NamedTemporaryFile(dir=folder, prefix="kv-") as file:
        os.posix_fallocate(file.fileno(), 0, math.prod(sizes) * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=math.prod(sizes), dtype=dtype).view(sizes)
