"""Loading of `thread_pool.cpp`, the threads that all kernels of a process share."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from sageLLM.runtime.kernels.cpu.build import build, load
from sageLLM.runtime.kernels.cpu.compiler import Compiler

SOURCE = Path(__file__).parent / "thread_pool.cpp"


@lru_cache(maxsize=1)
def load_thread_pool(compiler: Compiler | None) -> ctypes.CDLL:
    """The library, loaded once before the first kernel, with symbols visible to all kernels. Raises CompileError."""
    return load(build(SOURCE, "f32", compiler), mode=ctypes.RTLD_GLOBAL)


def set_num_threads(pool: ctypes.CDLL) -> None:
    """Kernels called from now on use as many threads as torch does."""
    pool.sage_set_num_threads(ctypes.c_int64(torch.get_num_threads()))
