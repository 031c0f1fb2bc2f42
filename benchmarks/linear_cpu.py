"""Times linear layers of two models on the CPU: ours with packed weights and oneDNN with reordered ones, in turn.

python benchmarks/linear_cpu.py [--dtypes bf16,f32] [--rows 1,16,1024] [--threads 1] [--seconds 0.5] [--json PATH]
python benchmarks/linear_cpu.py --sampling [--rows 1,16,32] [--seconds 5]

Weights are cold: each call takes the next of more copies than the caches can hold. With one thread the time is the
thread's processor time, which other processes disturb little; with several it is wall time. The best of all calls
counts, for both. `limit` is the larger of the times that reading the weight and the multiplications alone would take at
the rates that the machine reaches in the same run: streaming from memory, oneDNN's GEMM of large matrices.

With --sampling: the head of SmolLM-135M followed by `sample`, and the fused kernel of both, greedy. Medians count.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from machine import machine_facts
from torch import Tensor

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.bench.limits import LimitKernels
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.library import Library, kernel_function
from sageLLM.runtime.kernels.cpu.packing import DTYPE_NAMES, WeightMemory, pack

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SHAPES = {
    "SmolLM-135M qkv": (576, 960),
    "SmolLM-135M o": (576, 576),
    "SmolLM-135M gate+up": (576, 3072),
    "SmolLM-135M down": (1536, 576),
    "SmolLM-135M head": (576, 49152),
    "Qwen3-0.6B qkv": (1024, 4096),
    "Qwen3-0.6B o": (2048, 1024),
    "Qwen3-0.6B gate+up": (1024, 6144),
    "Qwen3-0.6B down": (3072, 1024),
    "Qwen3-0.6B head": (1024, 151936),
}
COLD_BYTES = 160_000_000
MAX_ROWS_OF_HEAD = 32


class Ceilings(NamedTuple):
    """Rates that the machine reaches, in bytes and operations per second."""

    read: float
    flops: dict[str, float]


class Timer:
    """Times of alternating calls."""

    def __init__(self, threads: int, seconds: float) -> None:
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        self.seconds = seconds

    def best(self, *calls: Callable[[int], object]) -> list[float]:
        return [min(times) for times in self.all(*calls)]

    def all(self, *calls: Callable[[int], object]) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in calls]
        until, number = time.perf_counter() + self.seconds, 0
        while time.perf_counter() < until or number < 4:
            for times, call in zip(found, calls, strict=True):
                start = self._clock()
                call(number)
                times.append(self._clock() - start)
            number += 1
        return found


class Ours:
    """The kernel `linear` on packed weights, called as the executor calls it."""

    def __init__(self, library: Library, weights: list[Tensor], rows: int) -> None:
        dtype, (features, inner) = weights[0].dtype, weights[0].shape
        memory = WeightMemory()
        self.packed = [pack(weight, 1, library, memory) for weight in weights]
        self._function = kernel_function(library.address("linear", DTYPE_NAMES[dtype]))
        self._shape = rows, features
        self._sizes = (ctypes.c_int64 * 6)(rows, inner, features, inner, inner, features)

    def __call__(self, x: Tensor, number: int) -> Tensor:
        """Returns new memory, as oneDNN does: a block that was just freed and is in the cache."""
        w, y = self.packed[number % len(self.packed)], torch.empty(self._shape, dtype=x.dtype)
        self._function((ctypes.c_void_p * 4)(x.data_ptr(), w.data_ptr(), None, y.data_ptr()), self._sizes, None)
        return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bf16,f32")
    parser.add_argument("--rows", default="1,4,16,32,128,1024")
    parser.add_argument("--shapes", default="", help="a part of the names of the shapes to measure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line of the table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sampling", action="store_true", help="measure the head and the choice of a token instead")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.sampling:
        for rows in map(int, given.rows.split(",")):
            print_sampling(rows, Timer(given.threads, given.seconds))
        return
    lines = []
    for line in measure(given.dtypes.split(","), [int(m) for m in given.rows.split(",")], given.shapes,
                        Timer(given.threads, given.seconds), given.threads):  # fmt: skip
        print(text_of(line), flush=True)
        lines.append(line)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine_facts(), "figures": lines}, indent=1) + "\n")


def native_library() -> Library:
    found = compiler.find_compiler()
    assert found is not None, "this needs a C++ compiler"
    library = Library(cpu.KERNELS, Path(cpu.__file__).parent, found)
    library.set_num_threads()
    return library


def measure(dtypes: list[str], rows: list[int], part: str, timer: Timer, threads: int) -> Iterator[dict[str, Any]]:
    """One line per dtype, shape and number of rows; the ceilings come first."""
    library = native_library()
    ceilings = ceilings_of(dtypes, library, timer, threads)
    yield {"read_gb_s": round(ceilings.read / 1e9, 1)} | {
        f"{k}_gflops": round(v / 1e9) for k, v in ceilings.flops.items()
    }
    for dtype in dtypes:
        for name, (inner, features) in SHAPES.items():
            if part in name:
                count = max(2, COLD_BYTES // (inner * features * DTYPES[dtype].itemsize))
                weights = [torch.randn(features, inner).to(DTYPES[dtype]) for _ in range(count)]
                for m in rows:
                    if "head" not in name or m <= MAX_ROWS_OF_HEAD:
                        yield {"dtype": dtype, "shape": name} | compared(m, weights, library, timer, ceilings)


def ceilings_of(dtypes: list[str], library: Library, timer: Timer, threads: int) -> Ceilings:
    read = LimitKernels(library, threads, timer.seconds).read(torch.ones(COLD_BYTES // 4))
    flops = {}
    for dtype in dtypes:
        a = torch.randn(512, 2048).to(DTYPES[dtype])
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(512, 2048).to(DTYPES[dtype]), 512)
        (best,) = timer.best(lambda _: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))  # noqa: B023
        flops[dtype] = 2 * 512 * 512 * 2048 / best
    return Ceilings(read, flops)


def compared(rows: int, weights: list[Tensor], library: Library, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    (features, inner), dtype = weights[0].shape, DTYPE_NAMES[weights[0].dtype]
    x, ours = torch.randn(rows, inner).to(weights[0].dtype), Ours(library, weights, rows)
    reordered = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]

    def onednn(number: int) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, reordered[number % len(reordered)], None, "none", [], "")
        return packed

    def plain(number: int) -> Tensor:
        return torch.nn.functional.linear(x, weights[number % len(weights)])

    mine, theirs, unpacked = timer.best(lambda number: ours(x, number), onednn, plain)
    flops, read = 2 * rows * features * inner, features * inner * weights[0].itemsize
    limit = max(flops / ceilings.flops[dtype], read / ceilings.read)
    return {"rows": rows, "ours_us": round(mine * 1e6, 1), "onednn_us": round(theirs * 1e6, 1),
            "f_linear_us": round(unpacked * 1e6, 1), "limit_us": round(limit * 1e6, 1),
            "gb_s": round(read / mine / 1e9, 1), "gflops": round(flops / mine / 1e9),
            "ratio": round(theirs / mine, 2)}  # fmt: skip


def print_sampling(rows: int, timer: Timer) -> None:
    """Each call reads the next copy of the weight, so that no call finds it in a cache."""
    library = native_library()
    head, sample, fused = (
        NativeCallable(cpu.KERNELS[op], library, reference.KERNELS[op])
        for op in ("lm_head", "sample", "lm_head_sample")
    )
    inner, features = SHAPES["SmolLM-135M head"]
    memory, x = WeightMemory(), torch.randn(rows, inner).bfloat16()
    weight = torch.randn(features, inner).bfloat16()
    copies = [pack(weight, 1, library, memory) for _ in range(COLD_BYTES // weight.nbytes + 2)]

    def next_copy(number: int, call: int) -> Any:
        return copies[(3 * number + call) % len(copies)]

    times = timer.all(
        lambda number: head(x, next_copy(number, 0)),
        lambda number: sample(head(x, next_copy(number, 1))),
        lambda number: fused(x, next_copy(number, 2)),
    )
    figures = [f"{name} {median(one) * 1e6:.0f} ({min(one) * 1e6:.0f}) us" for name, one in
               zip(("lm_head", "lm_head, sample", "lm_head_sample"), times, strict=True)]  # fmt: skip
    saved = 1 - median(times[2]) / median(times[1])
    print(f"S={rows:<4} median (least): {'  '.join(figures)}  {saved:.0%} saved", flush=True)


def text_of(line: dict[str, Any]) -> str:
    if "shape" not in line:
        return "  ".join(f"{name} {value}" for name, value in line.items())
    return (f"{line['dtype']:<4} {line['shape']:<20} m={line['rows']:<5} ours {line['ours_us']:>9} us  onednn "
            f"{line['onednn_us']:>9}  F.linear {line['f_linear_us']:>9}  limit {line['limit_us']:>9}  "
            f"{line['gb_s']:>5} GB/s {line['gflops']:>5} GFLOP/s  {line['ratio']:.2f}x onednn")  # fmt: skip


if __name__ == "__main__":
    main()
