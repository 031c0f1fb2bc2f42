"""Measures the limits of this machine: memory traffic, cache reads, multiply-adds of each instruction set, disk reads.

All loops are those of `runtime/kernels/cpu/limits.cpp`, on all threads. A limit is the best of several runs, because
whatever else runs on the machine only lowers a rate.
"""

import ctypes
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.kernels.cpu.packing import WeightMemory

LOOPS = ("avx2_f32", "avx512_f32", "avx512_bf16", "avx512_i8", "amx_bf16", "amx_i8")
"""The loops of multiply-adds, in the order of their numbers in limits.cpp."""
DRAM_BYTES = 2**28
"""Several times the caches of current processors."""
L2_BYTES, L3_BYTES = 2**19, 2**22
"""Bytes per thread that stay in the cache of this level; a smaller cache lowers the rate."""
DISK_BYTES = 2**27
PIECE = 2**20


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Rates in bytes and operations per second, with all threads; `multiply` is by loop, without those that are absent.

    `copy` counts the bytes that are read and those that are written.
    """

    threads: int
    read: float
    write: float
    copy: float
    l2_read: float
    l3_read: float
    multiply: dict[str, float] = field(default_factory=dict)
    disk_read: float = 0.0

    @property
    def peak_flops(self) -> dict[str, float]:
        """The best rate for each element type of `Hardware.peak_flops`."""
        found = {
            "f32": self._best("avx2_f32", "avx512_f32"),
            "bf16": self._best("avx2_f32", "avx512_f32", "avx512_bf16", "amx_bf16"),
            "f16": self._best("avx2_f32", "avx512_f32"),
            "f64": self._best("avx2_f32", "avx512_f32") / 2,
            "i8": self._best("avx2_f32", "avx512_f32", "avx512_i8", "amx_i8"),
        }
        return {dtype: rate for dtype, rate in found.items() if rate}

    def _best(self, *loops: str) -> float:
        return max(self.multiply.get(loop, 0.0) for loop in loops)


class LimitKernels:
    """The measuring loops of one library."""

    def __init__(self, library: Library, threads: int, seconds: float) -> None:
        library.set_num_threads()
        self._library, self._threads, self._seconds = library, threads, seconds

    def read(self, data: Tensor, passes: int = 1) -> float:
        """Bytes per second of reading `data`, as one stream per thread or as four, whichever is faster."""
        total = torch.zeros(self._threads)
        num_bytes = data.nbytes * passes
        sizes = [(data.nbytes, self._threads, streams, passes) for streams in (1, 4)]
        return max(num_bytes / self._best("limit_read", (data, total), one) for one in sizes)

    def write(self, data: Tensor) -> float:
        """Bytes per second of filling `data`."""
        return data.nbytes / self._best("limit_write", (data,), (data.nbytes, self._threads))

    def copy(self, source: Tensor, target: Tensor) -> float:
        """Bytes per second, read and written, of copying `source`."""
        return 2 * source.nbytes / self._best("limit_copy", (source, target), (source.nbytes, self._threads))

    def multiply(self) -> dict[str, float]:
        """Operations per second of the loops that the machine has."""
        found = {}
        for number, name in enumerate(LOOPS):
            done, sizes = torch.zeros(1, dtype=torch.int64), (number, self._threads, 200_000)
            seconds = self._best("limit_multiply", (done,), sizes)
            if done.item():
                found[name] = done.item() / seconds
        return found

    def _best(self, name: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> float:
        function = self._library.helper("limits.cpp", name, "f32")
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        numbers = (ctypes.c_int64 * len(sizes))(*sizes)
        return best_seconds(lambda: function(pointers, numbers, None), self._seconds)


def best_seconds(call: Callable[[], Any], seconds: float, least: int = 3) -> float:
    """The shortest time of a call, after one that is not counted, in runs of about `seconds` in total."""
    call()
    times: list[float] = []
    until = perf_counter() + seconds
    while len(times) < least or perf_counter() < until:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def measure_limits(library: Library, seconds: float = 0.3, disk_folder: Path | None = None) -> MachineLimits:
    """All limits, with as many threads as torch uses; `seconds` is the time of each measurement.

    The disk is that of `disk_folder`, by default of temporary files.
    """
    threads = torch.get_num_threads()
    kernels = LimitKernels(library, threads, seconds)
    memory = WeightMemory(reserve=0)  # large pages, as weights have
    data, target = (memory.take(DRAM_BYTES, torch.uint8).zero_() for _ in range(2))
    return MachineLimits(
        threads=threads,
        read=kernels.read(data),
        write=kernels.write(target),
        copy=kernels.copy(data, target),
        l2_read=kernels.read(data[: L2_BYTES * threads], passes=200),
        l3_read=kernels.read(data[: L3_BYTES * threads], passes=20),
        multiply=kernels.multiply(),
        disk_read=disk_read_rate(disk_folder),
    )


def disk_read_rate(folder: Path | None = None, num_bytes: int = DISK_BYTES) -> float:
    """Bytes per second of reading a new file that is not in the page cache; 0 where the cache cannot be dropped."""
    if not hasattr(os, "posix_fadvise"):
        return 0.0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        piece = os.urandom(PIECE)
        for _ in range(num_bytes // PIECE):
            file.write(piece)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, num_bytes, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(PIECE)
        start = perf_counter()
        while file.readinto(buffer):
            pass
        return num_bytes / (perf_counter() - start)
