"""Native functions of a process: generated kernels and the step runner."""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.kernels.cpu.build import build, load, symbol
from sageLLM.runtime.kernels.cpu.communicator import has_communicator
from sageLLM.runtime.kernels.cpu.compiler import Compiler
from sageLLM.runtime.kernels.cpu.library import ELEMENTS, Library, raise_error
from sageLLM.runtime.kernels.cpu.point_to_point import is_connected
from sageLLM.runtime.kernels.cpu.thread_pool import load_thread_pool

RUNNER = Path(__file__).parent / "runner.cpp"


class NativeRunner:
    """Addresses of kernels, and the function that calls them one after another, for `NativePlan`."""

    def __init__(self, libraries: Sequence[Library], compiler: Compiler | None) -> None:
        """The libraries, of the package and then of plugins, must have disjoint ops. Without a compiler, libraries that
        were built before are used. Raises CompileError."""
        self.library = libraries[0]
        self._homes = {op: library for library in libraries for op in library.kernels}
        self.kernels: Mapping[str, NativeKernel] = {op: home.kernels[op] for op, home in self._homes.items()}
        load_thread_pool(compiler)
        runner = load(build(RUNNER, ELEMENTS[0], compiler))
        self._run = symbol(runner, "sage_run")
        self._run.argtypes = (ctypes.c_void_p, *(ctypes.c_int64,) * 4, ctypes.c_void_p)
        self._run.restype = ctypes.c_char_p
        self.copy_address = _address(runner, "sage_gather_rows")
        self.poison_address = _address(runner, "sage_poison")

    def prepare(self, ops: Iterable[str], element: str, form: str | None = None) -> None:
        """Builds the files of the ops, several at a time, for weights of a form. Raises CompileError."""
        if element not in ELEMENTS:
            return
        by_library: dict[int, tuple[Library, list[str]]] = {}
        for op in ops:
            if (home := self._homes.get(op)) is not None:
                by_library.setdefault(id(home), (home, []))[1].append(op)
        for home, own in by_library.values():
            home.prepare(own, element, form)

    def why_not(self, op: str, element: str | None, attrs: Mapping[str, Any]) -> str | None:
        """The reason why the kernel cannot be used for an element type and these attrs, or None."""
        kernel = self.kernels[op]
        if kernel.is_collective and not has_communicator():
            return "the ranks share no memory"
        if kernel.is_point_to_point and not is_connected(attrs["group"], attrs["peer"]):
            return f"no memory is shared with rank {attrs['peer']} of {attrs['group']}"
        return None if element is None or element in ELEMENTS else f"no kernel is compiled for {element}"

    def address(self, op: str, element: str | None, *, unpacks: bool = False, form: str | None = None) -> int:
        """The address of the op's function for weights of a form, or of the one that reads its table packed.

        May raise CompileError.
        """
        return self._homes[op].address(op, element or ELEMENTS[0], unpacks=unpacks, form=form)

    def run(self, calls: int, first: int, end: int, num_streams: int, stamps: int = 0) -> None:
        """Makes calls `first` to `end` of the list at the address `calls`, on as many threads as torch uses.

        Each stream but the first has a thread of its own. `stamps` is the address of the times to write, one for each
        call of the list, or 0. Raises KernelError for the first call that fails; the calls after it are not made.
        """
        raise_error(self._run(calls, first, end, num_streams, torch.get_num_threads(), stamps))


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(symbol(library, name), ctypes.c_void_p).value or 0
