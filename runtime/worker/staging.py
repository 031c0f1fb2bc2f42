"""Caches with staging memory: their last blocks share memory with the caches of other layers.

A kernel addresses the blocks of a cache relative to its first one. So that it also finds the blocks that a step loads
from a tier below, the memory of the cache is followed by a mapping of a staging buffer. Layers take turns on two
buffers: a buffer of layer l is mapped again after the caches of the layers l + 2, l + 4 and so on.
"""

import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

NUM_BUFFERS = 2
"""One for the layer that computes, and one for the layer that is loaded."""
MAP_FIXED = 0x10  # of <sys/mman.h> on Linux and macOS


def staged_caches(
    num_layers: int, num_blocks: int, num_staged: int, block: Sequence[int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Caches [num_blocks + num_staged, *block] of zeros, of which the last `num_staged` blocks are staging memory.

    Raises MemoryError if the system refuses a mapping.
    """
    block_bytes = math.prod(block) * dtype.itemsize
    files = [_shared_memory(_whole_pages(num_staged * block_bytes)) for _ in range(min(NUM_BUFFERS, num_layers))]
    try:
        return [
            _staged(num_blocks * block_bytes, num_staged * block_bytes, files[layer % len(files)])
            .view(dtype)
            .view(num_blocks + num_staged, *block)
            for layer in range(num_layers)
        ]
    finally:
        for file in files:
            os.close(file)


def _staged(num_bytes: int, num_staged: int, file: int) -> torch.Tensor:
    """Private memory, which is allocated on first use, followed by a shared mapping of the file."""
    # The shared mapping begins with a page, so the private memory begins within one.
    boundary = _whole_pages(num_bytes)
    try:
        memory = mmap.mmap(-1, boundary + _whole_pages(num_staged), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from None
    array = np.frombuffer(memory, np.uint8)  # unmapped, with the mapping of the file, when no tensor refers to it
    _map_file(array.ctypes.data + boundary, _whole_pages(num_staged), file)
    return torch.from_numpy(array)[boundary - num_bytes : boundary + num_staged]


def _map_file(address: int, num_bytes: int, file: int) -> None:
    """Maps a file over a part of an existing mapping, which Python's mmap cannot do."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if libc.mmap(address, num_bytes, access, mmap.MAP_SHARED | MAP_FIXED, file, 0) != address:
        raise MemoryError(os.strerror(ctypes.get_errno()))


def _shared_memory(num_bytes: int) -> int:
    """A descriptor of memory that can be mapped several times."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("sagellm-kv-staging")
    else:
        file, path = tempfile.mkstemp(prefix="sagellm-kv-staging-")
        Path(path).unlink()
    os.ftruncate(file, num_bytes)
    return file


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
