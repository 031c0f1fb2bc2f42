"""Loading of generated C++ kernels: a file is built when one of its ops is first used, per element type."""

import ctypes
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.core.model.kv_form import KV_FORMS
from sageLLM.runtime.kernels.cpu.build import Target, build, built, load, symbol
from sageLLM.runtime.kernels.cpu.build_jobs import BuildJob, build_all
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
        self._paths: dict[Target, dict[str, Path]] = {}
        self._loaded: dict[Path, ctypes.CDLL] = {}

    def address(self, op: str, element: str, *, unpacks: bool = False, form: str | None = None) -> int:
        """The address of the op's function, for calls from native code; built and loaded first. Raises CompileError.

        With `unpacks` it is the function that reads the op's table packed. With a `form` the packed weight consists of
        codes of that form (`PackedWeight.native`, `coded.h`), or the KV caches do (`kv_forms.h`); no op reads both.
        """
        kernel = self.kernels[op]
        name = f"{op}_packed" if unpacks else op
        return self._address(kernel.source, self._element(kernel, element), name, form)

    def microkernel(self, op: str, element: str, form: str | None = None) -> str:
        """The instruction set of the GEMM of an op, for weights of a form."""
        kernel = self.kernels[op]
        target = self._target(kernel.source, self._element(kernel, element), form)
        any_kernel = next(iter(self._paths.get(target, {})), op)
        function = symbol(self._file(target, any_kernel), "sage_microkernel")
        function.restype = ctypes.c_char_p
        return str(function().decode())

    def set_num_threads(self) -> None:
        """Makes a kernel that is called by itself use as many threads as torch does; the step runner does so too."""
        set_num_threads(load_thread_pool(self._compiler))

    def helper(self, source: str, name: str, element: str) -> Any:
        """A function of a hand-written source in the folder of this file."""
        return kernel_function(self._address(str(HEADERS / source), element, name))

    def prepare(self, ops: Iterable[str], element: str, form: str | None = None) -> None:
        """Builds the kernels of the ops that have not been built, and no others. Raises CompileError."""
        build_all(self.jobs(ops, element, form), self._compiler)

    def jobs(self, ops: Iterable[str], element: str, form: str | None = None) -> list[BuildJob]:
        """The libraries to build for the ops, without those of ops that seldom have to move data."""
        wanted: dict[Target, set[str]] = {}
        for op in ops:
            kernel = self.kernels.get(op)
            if kernel is not None and not kernel.parts:
                target = self._target(kernel.source, self._element(kernel, element), form)
                wanted.setdefault(target, set()).update([op] if kernel.unpacks is None else [op, f"{op}_packed"])
        missing = {target: self._missing(target, names) for target, names in wanted.items()}
        return [BuildJob(target, names) for target, names in missing.items() if names]

    def _missing(self, target: Target, names: Set[str]) -> frozenset[str]:
        """The kernels that no library has."""
        if self._find(target, names):
            return frozenset()
        return frozenset(name for name in names if not self._find(target, {name}))

    def _find(self, target: Target, names: Set[str]) -> bool:
        """Whether these kernels have a library, which is checked once."""
        paths = self._paths.setdefault(target, {})
        if not names <= paths.keys() and (path := built(target, self._compiler, names)) is not None:
            self._take(target, path)
        return names <= paths.keys()

    def _take(self, target: Target, path: Path) -> None:
        paths = self._paths.setdefault(target, {})
        paths |= {name: paths.get(name, path) for name in target.kernels_of(path)}

    def _element(self, kernel: NativeKernel, element: str) -> str:
        return element if kernel.element else ELEMENTS[0]

    def _address(self, source: str, element: str, name: str, form: str | None = None) -> int:
        function = symbol(self._file(self._target(source, element, form), name), f"sage_{name}")
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    def _target(self, source: str, element: str, form: str | None) -> Target:
        return Target(self._folder / source, element, self._flags_of(form))

    def _flags_of(self, form: str | None) -> tuple[str, ...]:
        if form is None:
            return self._flags
        if form in (one.native for one in KV_FORMS.values()):
            return (*self._flags, f"-DSAGE_KV={form}")
        codes, _, activations = form.partition("_")
        own = ("-DSAGE_INT8_ROWS=1",) if activations else ()
        return (*self._flags, f"-DSAGE_WEIGHT={codes}_codes", *own)

    def _file(self, target: Target, name: str) -> ctypes.CDLL:
        """The loaded library with a kernel; all of the file is built if none has it, as further ones may follow."""
        if self._find(target, {name}):
            path = self._paths[target][name]
        else:
            path = build(target.source, target.element, self._compiler, target.flags)
            self._take(target, path)
        if path not in self._loaded:
            self._load_what_it_uses(target.source.name)
            self._loaded[path] = self._load(path)
        return self._loaded[path]

    def _load(self, path: Path) -> ctypes.CDLL:
        return load(path)

    def _load_what_it_uses(self, source: str) -> None:
        load_thread_pool(self._compiler)
        kernels = [kernel for kernel in self.kernels.values() if kernel.source == source]
        if any(kernel.is_collective for kernel in kernels):
            load_communicator(self._compiler)
        if any(kernel.is_point_to_point for kernel in kernels):
            load_point_to_point(self._compiler)
