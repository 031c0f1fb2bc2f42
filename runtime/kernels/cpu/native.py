"""Native functions of a process: generated kernels and the step runner."""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.kernels.cpu.build import build, load, symbol
from sageLLM.runtime.kernels.cpu.build_jobs import build_all, hand_written
from sageLLM.runtime.kernels.cpu.communicator import has_communicator
from sageLLM.runtime.kernels.cpu.compiler import Compiler
from sageLLM.runtime.kernels.cpu.library import ELEMENTS, Library, raise_error
from sageLLM.runtime.kernels.cpu.point_to_point import is_connected
from sageLLM.runtime.kernels.cpu.thread_pool import load_thread_pool

RUNNER = Path(__file__).parent / "runner.cpp"


class _RunnerFunctions(NamedTuple):
    run: Any
    copy_address: int
    poison_address: int


class KernelUse(NamedTuple):
    """An op of a graph, the element type that it computes in, and the form of the codes of its weight or KV caches."""

    op: str
    element: str
    form: str | None = None


class NativeRunner:
    """Addresses of kernels, and the function that calls them one after another, for `NativePlan`."""

    def __init__(self, libraries: Sequence[Library], compiler: Compiler | None) -> None:
        """The libraries, of the package and then of plugins, must have disjoint ops. Without a compiler, libraries that
        were built before are used."""
        self.library = libraries[0]
        self._homes = {op: library for library in libraries for op in library.kernels}
        self.kernels: Mapping[str, NativeKernel] = {op: home.kernels[op] for op, home in self._homes.items()}
        self._compiler = compiler
        self._prepared: set[KernelUse] = set()

    def prepare(self, uses: Iterable[KernelUse]) -> None:
        """Builds all kernels of these uses that are not built yet, several files at a time, and loads the runner.

        Raises CompileError.
        """
        new = set(uses) - self._prepared
        if not new:
            return
        by_file: dict[tuple[int, str, str | None], tuple[Library, list[str]]] = {}
        for op, element, form in sorted(new, key=str):
            if element in ELEMENTS and (home := self._homes.get(op)) is not None:
                by_file.setdefault((id(home), element, form), (home, []))[1].append(op)
        jobs = [hand_written("thread_pool.cpp"), hand_written("runner.cpp")]
        jobs += [hand_written("packing.cpp", element) for element in {element for _, element, _ in by_file}]
        for (_, element, form), (home, ops) in by_file.items():
            jobs += home.jobs(ops, element, form)
        build_all(jobs, self._compiler)
        _ = self._functions  # an error in loading must occur before the weights are packed
        self._prepared |= new

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
        raise_error(self._functions.run(calls, first, end, num_streams, torch.get_num_threads(), stamps))

    @property
    def copy_address(self) -> int:
        return self._functions.copy_address

    @property
    def poison_address(self) -> int:
        return self._functions.poison_address

    @cached_property
    def _functions(self) -> _RunnerFunctions:
        """Raises CompileError."""
        load_thread_pool(self._compiler)
        runner = load(build(RUNNER, ELEMENTS[0], self._compiler))
        run = symbol(runner, "sage_run")
        run.argtypes, run.restype = (ctypes.c_void_p, *(ctypes.c_int64,) * 4, ctypes.c_void_p), ctypes.c_char_p
        return _RunnerFunctions(run, _address(runner, "sage_gather_rows"), _address(runner, "sage_poison"))


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(symbol(library, name), ctypes.c_void_p).value or 0
