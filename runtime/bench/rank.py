"""A process that measures as one rank: its share of the machine's limits, its kernels, and the link to the others.

    python -m sageLLM.runtime.bench.rank '{"rank": 0, ...}'

The argument is a `RankSpec`, and the last line of stdout a `RankResult`, both as JSON. All ranks measure at the same
time, so that each has its share of what they have in common, such as the memory.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from sageLLM.generated.kernels import cpu
from sageLLM.runtime.bench.limits import MachineLimits, measure_limits
from sageLLM.runtime.bench.sweep import measure_kernels
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.kernels.cpu.communicator import open_communicator
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library, kernel_function
from sageLLM.runtime.registry.plugins import load_registry

LINK_FLOATS = (1, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
LINK_ROUNDS = 200


class RankSpec(msgspec.Struct, frozen=True):
    """One of `num_ranks` ranks with `threads` threads each; `memory` is a descriptor for their collectives.

    `parts` are of limits, kernels and link; kernels are measured in `dtype`, the shortest of `runs` times.
    """

    rank: int
    num_ranks: int
    threads: int
    memory: int | None
    parts: list[str]
    dtype: str = "bfloat16"
    runs: int = 3
    seconds: float = 0.3
    disk_folder: str | None = None


class RankResult(msgspec.Struct, frozen=True):
    """Kernels are rows by family (`kernel_times.Row`); the link is (bytes, seconds) of all-reduces."""

    limits: MachineLimits | None = None
    kernels: dict[str, list[list[float]]] = {}
    all_reduces: list[tuple[int, float]] = []


def measure_rank(spec: RankSpec) -> RankResult:
    """Measures the parts that the spec names. Raises SageError without a compiler."""
    torch.set_num_threads(spec.threads)
    compiler = find_compiler()
    if compiler is None:
        raise SageError("the machine's limits are measured by C++ code; install g++ or clang++, or set CXX to one")
    library = Library(cpu.KERNELS, Path(cpu.__file__).parent, compiler)
    library.set_num_threads()
    if spec.memory is not None:
        open_communicator(spec.memory, spec.rank, spec.num_ranks, compiler)
        _AllReduce(library, 1)()  # waits for all ranks
    folder = None if spec.disk_folder is None else Path(spec.disk_folder)
    limits = measure_limits(library, spec.seconds, folder) if "limits" in spec.parts else None
    all_reduces = _measure_link(library) if "link" in spec.parts else []
    kernels: dict[str, list[list[float]]] = {}
    if "kernels" in spec.parts:
        measured = measure_kernels(load_registry(()), spec.dtype, spec.runs)
        kernels = {family: [list(row) for row in rows] for family, rows in measured.kernels.items()}
    return RankResult(limits, kernels, all_reduces)


class _AllReduce:
    """The all-reduce of the CPU kernels for a vector of float32, called as a step calls it."""

    def __init__(self, library: Library, num: int) -> None:
        self._x, self._y = torch.ones(1, num), torch.empty(1, num)
        self._function: Any = kernel_function(library.address("all_reduce", "f32"))
        self._tensors = (ctypes.c_void_p * 2)(self._x.data_ptr(), self._y.data_ptr())
        self._sizes, self._attrs = (ctypes.c_int64 * 4)(1, num, num, num), (ctypes.c_double * 1)(0.0)

    def __call__(self) -> None:
        self._function(self._tensors, self._sizes, self._attrs)


def _measure_link(library: Library) -> list[tuple[int, float]]:
    """Bytes and median seconds of all-reduces."""
    found = []
    for num in LINK_FLOATS:
        all_reduce, times = _AllReduce(library, num), []
        for _ in range(LINK_ROUNDS):
            start = time.perf_counter()
            all_reduce()
            times.append(time.perf_counter() - start)
        found.append((4 * num, statistics.median(times[LINK_ROUNDS // 10 :])))
    return found


def main() -> None:
    try:
        result = measure_rank(msgspec.json.decode(sys.argv[1], type=RankSpec))
    except (SageError, OSError) as error:
        sys.exit(f"error: {error}")
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main()
