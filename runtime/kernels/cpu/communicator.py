"""Collectives of the CPU kernels among the ranks of one host, through memory that they share (`communicator.cpp`)."""

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.kernels.cpu.build import build, load, symbol
from sageLLM.runtime.kernels.cpu.compiler import Compiler

SOURCE = Path(__file__).parent / "communicator.cpp"
BUFFER_BYTES = 2**20
"""The bytes that a rank passes on in one round."""
CACHE_LINE = 64  # of a rank's counter, as in communicator.cpp


@dataclass(slots=True)
class _State:
    num_ranks: int = 0
    gather: Any = None


_state = _State()


@lru_cache(maxsize=1)
def load_communicator(compiler: Compiler | None) -> ctypes.CDLL:
    """The library, loaded once before the kernels that use it, with symbols visible to them. Raises CompileError."""
    return load(build(SOURCE, "f32", compiler), mode=ctypes.RTLD_GLOBAL)


def make_shared_memory(num_ranks: int) -> int:
    """The descriptor of new memory for a group of ranks; it has no name, and is gone with the last process."""
    file = os.memfd_create("sagellm-communicator", 0)
    os.ftruncate(file, num_ranks * (CACHE_LINE + 2 * BUFFER_BYTES))
    return file


def open_communicator(file: int, rank: int, num_ranks: int, compiler: Compiler | None) -> None:
    """Makes this process a rank of the group with that memory. Raises CompileError."""
    opened = symbol(load_communicator(compiler), "sage_open_communicator")
    opened.argtypes = (ctypes.c_int64,) * 4
    opened.restype = ctypes.c_char_p
    message = opened(file, rank, num_ranks, BUFFER_BYTES)
    if message is not None:
        raise OSError(message.decode())
    _state.num_ranks, _state.gather = num_ranks, symbol(load_communicator(compiler), "sage_all_gather")
    _state.gather.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def close_communicator() -> None:
    """Makes this process a single rank again, which uses torch.distributed."""
    _state.num_ranks = 0


def has_communicator() -> bool:
    """Whether the kernels of this process can meet those of other ranks."""
    return _state.num_ranks > 0


def gather_bytes(x: Tensor) -> Tensor:
    """The x u8[...] of all ranks of the communicator, u8[ranks, ...]."""
    own = x.contiguous()
    found = torch.empty((_state.num_ranks, *x.shape), dtype=torch.uint8)
    _state.gather(own.data_ptr(), found.data_ptr(), own.numel())
    return found
