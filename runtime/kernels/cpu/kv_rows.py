"""Loading of `kv_rows.cpp`, which copies, sends and receives rows of KV in paged pools and computes their digest."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sageLLM.runtime.kernels.cpu.build import build, load, symbol
from sageLLM.runtime.kernels.cpu.compiler import Compiler

SOURCE = Path(__file__).parent / "kv_rows.cpp"


class NativeRows(ctypes.Structure):
    """Rows of tokens in the blocks of a cache, as `Rows` of the C++ file; it does not keep the memory alive."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
    )


class RowFunctions(NamedTuple):
    """The functions of the library; none holds the interpreter's lock.

    - `copy(source, target or None, num_tokens, seed)` returns the digest.
    - `send(socket, rows, num_rows, num_tokens, digest)` and `receive` return 0 or the number of an error.
    """

    copy: Any
    send: Any
    receive: Any


@lru_cache(maxsize=1)
def load_row_functions(compiler: Compiler | None) -> RowFunctions:
    """Raises CompileError."""
    library = load(build(SOURCE, "f32", compiler))
    found = RowFunctions(*(symbol(library, f"sage_{name}_rows") for name in RowFunctions._fields))
    rows, digest = ctypes.POINTER(NativeRows), ctypes.POINTER(ctypes.c_uint64)
    found.copy.argtypes, found.copy.restype = (rows, rows, ctypes.c_int64, ctypes.c_uint64), ctypes.c_uint64
    for function in (found.send, found.receive):
        function.argtypes = (ctypes.c_int, rows, ctypes.c_int64, ctypes.c_int64, digest)
        function.restype = ctypes.c_int
    return found
