"""Loads generated C++ kernels: each file is built when one of its ops is first asked for, per element type."""

import ctypes
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.kernels.cpu.compiler import HEADERS, Compiler, build
from sageLLM.runtime.kernels.cpu.thread_pool import load_thread_pool, set_num_threads

ELEMENTS = ("f32", "bf16", "f16")
"""The element types that a generated file can be compiled for."""

Symbol = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class Library:
    """The kernels of one generated tree. `folder` holds the sources that the table names."""

    def __init__(
        self, kernels: Mapping[str, NativeKernel], folder: Path, compiler: Compiler, flags: tuple[str, ...] = ()
    ) -> None:
        self.kernels = kernels
        self._folder, self._compiler, self._flags = folder, compiler, flags
        self._loaded: dict[tuple[str, str], ctypes.CDLL] = {}

    def address(self, op: str, element: str, *, unpacks: bool = False) -> int:
        """Where the op's function lies, for calls from native code; built and loaded first. May raise CompileError.

        With `unpacks` it is the function that reads the op's table packed.
        """
        kernel = self.kernels[op]
        symbol = f"{kernel.symbol}_packed" if unpacks else kernel.symbol
        function = getattr(self._file(kernel.source, self._element(kernel, element)), symbol)
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    def set_num_threads(self) -> None:
        """A function called by itself takes as many threads as torch does; a plan sees to that on its own."""
        set_num_threads(load_thread_pool(self._compiler))

    def helper(self, source: str, name: str, element: str) -> Any:
        """A function of a hand-written source beside this file."""
        return Symbol((f"sage_{name}", self._file(str(HEADERS / source), element)))

    def prepare(self, ops: Iterable[str], element: str) -> None:
        """Builds what the ops need, two files at a time."""
        kernels = [self.kernels[op] for op in ops if op in self.kernels]
        wanted = dict.fromkeys((kernel.source, self._element(kernel, element)) for kernel in kernels)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: self._built(*one), wanted))

    def _element(self, kernel: NativeKernel, element: str) -> str:
        return element if kernel.element else ELEMENTS[0]

    def _built(self, source: str, element: str) -> Path:
        return build(self._folder / source, element, self._compiler, self._flags)

    def _file(self, source: str, element: str) -> ctypes.CDLL:
        key = source, element
        if key not in self._loaded:
            load_thread_pool(self._compiler)
            self._loaded[key] = ctypes.CDLL(str(self._built(source, element)))
        return self._loaded[key]
