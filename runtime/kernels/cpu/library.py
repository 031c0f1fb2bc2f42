"""Loading of generated C++ kernels: a file is built when one of its ops is first used, per element type."""

import ctypes
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.core.model.kv_form import KV_FORMS
from sageLLM.runtime.kernels.cpu.build import build, is_built, load, symbol
from sageLLM.runtime.kernels.cpu.communicator import load_communicator
from sageLLM.runtime.kernels.cpu.compiler import HEADERS, Compiler
from sageLLM.runtime.kernels.cpu.point_to_point import load_point_to_point
from sageLLM.runtime.kernels.cpu.thread_pool import load_thread_pool, set_num_threads

ELEMENTS = ("f32", "bf16", "f16")
"""The element types that a generated file can be compiled for."""

_Signature = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class KernelError(RuntimeError):
    """A kernel failed; the message names the kernel and the broken rule."""


def kernel_function(address: int) -> Any:
    """The kernel at an address as a function of `tensors`, `sizes` and `attrs`, which raises KernelError."""
    function = _Signature(address)
    function.errcheck = raise_error  # type: ignore[assignment]
    return function


def raise_error(message: bytes | None, function: Any = None, arguments: Any = None) -> None:
    """Raises KernelError if a native function returned a message; as `errcheck` of a ctypes function."""
    if message is not None:
        raise KernelError(message.decode())


class Library:
    """The kernels of one generated tree. `folder` contains the sources that the table names.

    Without a compiler, libraries that were built before are used.
    """

    def __init__(
        self, kernels: Mapping[str, NativeKernel], folder: Path, compiler: Compiler | None, flags: tuple[str, ...] = ()
    ) -> None:
        self.kernels = kernels
        self._folder, self._compiler, self._flags = folder, compiler, flags
        self._loaded: dict[tuple[str, str, str | None], ctypes.CDLL] = {}

    def address(self, op: str, element: str, *, unpacks: bool = False, form: str | None = None) -> int:
        """The address of the op's function, for calls from native code; built and loaded first. Raises CompileError.

        With `unpacks` it is the function that reads the op's table packed. With a `form` the packed weight consists of
        codes of that form (`PackedWeight.native`, `coded.h`), or the KV caches do (`kv_forms.h`); no op reads both.
        """
        kernel = self.kernels[op]
        name = f"{kernel.symbol}_packed" if unpacks else kernel.symbol
        return self._address(kernel.source, self._element(kernel, element), name, form)

    def microkernel(self, op: str, element: str, form: str | None = None) -> str:
        """The instruction set of the GEMM of an op, for weights of a form."""
        kernel = self.kernels[op]
        function = symbol(self._file(kernel.source, self._element(kernel, element), form), "sage_microkernel")
        function.restype = ctypes.c_char_p
        return str(function().decode())

    def set_num_threads(self) -> None:
        """Makes a kernel that is called by itself use as many threads as torch does; the step runner does so too."""
        set_num_threads(load_thread_pool(self._compiler))

    def helper(self, source: str, name: str, element: str) -> Any:
        """A function of a hand-written source in the folder of this file."""
        return kernel_function(self._address(str(HEADERS / source), element, f"sage_{name}"))

    def prepare(self, ops: Iterable[str], element: str, form: str | None = None) -> None:
        """Builds the files of the ops, two at a time; an error or Ctrl-C stops all compilers. Raises CompileError.

        Without files to build it starts no threads: where memory is full, Python would wait for them for ever.
        """
        kernels = [self.kernels[op] for op in ops if op in self.kernels]
        files = dict.fromkeys((kernel.source, self._element(kernel, element)) for kernel in kernels)
        missing = [file for file in files if not self._is_built(*file, form)]
        if not missing:
            return
        stop = Event()
        with ThreadPoolExecutor(2) as pool:
            try:
                list(pool.map(lambda file: self._built(file[0], file[1], stop, form), missing))
            finally:
                stop.set()

    def _element(self, kernel: NativeKernel, element: str) -> str:
        return element if kernel.element else ELEMENTS[0]

    def _address(self, source: str, element: str, name: str, form: str | None = None) -> int:
        return ctypes.cast(symbol(self._file(source, element, form), name), ctypes.c_void_p).value or 0

    def _is_built(self, source: str, element: str, form: str | None) -> bool:
        is_loaded = (source, element, form) in self._loaded
        return is_loaded or is_built(self._folder / source, element, self._compiler, self._flags_of(form))

    def _built(self, source: str, element: str, stop: Event | None = None, form: str | None = None) -> Path:
        return build(self._folder / source, element, self._compiler, self._flags_of(form), stop)

    def _flags_of(self, form: str | None) -> tuple[str, ...]:
        if form is None:
            return self._flags
        if form in (one.native for one in KV_FORMS.values()):
            return (*self._flags, f"-DSAGE_KV={form}")
        codes, _, activations = form.partition("_")
        own = ("-DSAGE_INT8_ROWS=1",) if activations else ()
        return (*self._flags, f"-DSAGE_WEIGHT={codes}_codes", *own)

    def _file(self, source: str, element: str, form: str | None) -> ctypes.CDLL:
        key = source, element, form
        if key not in self._loaded:
            load_thread_pool(self._compiler)
            kernels = [kernel for kernel in self.kernels.values() if kernel.source == source]
            if any(kernel.is_collective for kernel in kernels):
                load_communicator(self._compiler)
            if any(kernel.is_point_to_point for kernel in kernels):
                load_point_to_point(self._compiler)
            self._loaded[key] = load(self._built(source, element, form=form))
        return self._loaded[key]
