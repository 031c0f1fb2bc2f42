"""The threads that all kernels of a process share: `team.cpp`, loaded once, before the first kernel."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from sageLLM.runtime.kernels.cpu.compiler import Compiler, build

SOURCE = Path(__file__).parent / "team.cpp"


@lru_cache(maxsize=1)
def load_team(compiler: Compiler) -> ctypes.CDLL:
    """The library, whose names all kernels see. Raises CompileError."""
    return ctypes.CDLL(str(build(SOURCE, "f32", compiler)), mode=ctypes.RTLD_GLOBAL)


def use_threads_of_torch(team: ctypes.CDLL) -> None:
    """Kernels called from now on take as many threads as torch does."""
    team.sage_use_threads(ctypes.c_int64(torch.get_num_threads()))
