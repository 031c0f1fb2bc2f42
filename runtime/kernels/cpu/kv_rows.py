"""Loading of `kv_rows.cpp`, which copies rows of KV between paged pools and computes their digest in one pass."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from sageLLM.runtime.kernels.cpu.build import build, load, symbol
from sageLLM.runtime.kernels.cpu.compiler import Compiler

SOURCE = Path(__file__).parent / "kv_rows.cpp"


class NativeRows(ctypes.Structure):
    """Rows of tokens in the blocks of a cache, as `Rows` of the C++ file; it does not keep the memory alive."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
    )


@lru_cache(maxsize=1)
def load_copy_rows(compiler: Compiler | None) -> Any:
    """`sage_copy_rows(source, target or None, num_tokens, row_bytes, seed)`, the digest. Raises CompileError."""
    function = symbol(load(build(SOURCE, "f32", compiler)), "sage_copy_rows")
    rows = ctypes.POINTER(NativeRows)
    function.argtypes = (rows, rows, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64)
    function.restype = ctypes.c_uint64
    return function
