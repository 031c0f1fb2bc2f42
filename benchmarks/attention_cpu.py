"""Times attention on the CPU: our kernels over the paged cache and torch's over contiguous keys, in turn.

python benchmarks/attention_cpu.py [--dtypes bf16,f32] [--part prefill] [--threads 1] [--seconds 0.5] [--json PATH]

torch receives its fastest layout before the clock starts: keys gathered from the pages, in a prefill one copy of them
per query head, in a decode the query heads of a key head as rows of one GEMM. Keys are cold in a decode, as in an
engine, where the other layers' keys are read in between: each call takes the next of several copies. With one thread
the time is the thread's processor time; with several it is wall time. The best and the median of the calls are printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import machine_facts
from torch import Tensor
from torch.nn import functional

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
HEADS = ((9, 3, 64), (16, 8, 128))
"""Query heads, key heads and width: SmolLM-135M, Qwen3-0.6B."""
PROMPTS, BATCHES, CONTEXTS = (256, 1024), (1, 16, 32), (128, 512, 2048)
PAGE, COLD_BYTES = 16, 48_000_000
Call = Callable[[int], object]


class Paged(NamedTuple):
    """Sequences of one length in a cache with shuffled pages."""

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, sequences: int, length: int, heads: int, width: int, dtype: torch.dtype) -> "Paged":
        pages = -(-length // PAGE)
        k, v = (torch.randn(sequences * pages, PAGE, heads, width).to(dtype) for _ in range(2))
        table = torch.randperm(sequences * pages).view(sequences, pages).to(torch.int32)
        return cls(k, v, table, torch.full((sequences,), length, dtype=torch.int32))

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [sequences, heads, length, width]."""
        length = int(self.lengths[0])
        k, v = (x[self.table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for x in (self.k, self.v))
        return k, v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bf16")
    parser.add_argument("--part", choices=["prefill", "decode"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line of the table")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    lines = []
    for line in measure(given.dtypes.split(","), given.part, clock, given.seconds):
        print(text_of(line), flush=True)
        lines.append(line)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine_facts(), "figures": lines}, indent=1) + "\n")


def measure(
    dtypes: list[str], part: str | None, clock: Callable[[], float], seconds: float
) -> Iterator[dict[str, Any]]:
    compiler = find_compiler()
    assert compiler is not None, "these kernels need a C++ compiler"
    library = Library(cpu.KERNELS, Path(cpu.__file__).parent, compiler)
    prefill, decode = (
        NativeCallable(cpu.KERNELS[name], library, reference.KERNELS[name])
        for name in ("paged_prefill_attention", "paged_decode_attention")
    )
    for dtype in dtypes:
        for heads in HEADS:
            for length in PROMPTS if part != "decode" else ():
                line = timed(prefills(prefill, length, *heads, DTYPES[dtype]), clock, seconds)
                flops = 2 * length * (length + 1) * heads[0] * heads[2]
                yield described(dtype, heads, "prefill", 1, length, line, gflops=flops)
            for batch in BATCHES if part != "prefill" else ():
                for length in CONTEXTS:
                    line = timed(decodes(decode, batch, length, *heads, DTYPES[dtype]), clock, seconds)
                    read = 2 * batch * length * heads[1] * heads[2] * DTYPES[dtype].itemsize
                    yield described(dtype, heads, "decode", batch, length, line, gb_s=read)


def prefills(
    kernel: NativeCallable, length: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> tuple[Call, Call]:
    """A whole prompt, causal."""
    keys = Paged.of(1, length, key_heads, width, dtype)
    q, start = torch.randn(length, heads, width).to(dtype), torch.tensor([0, length], dtype=torch.int32)
    dense = [x.repeat_interleave(heads // key_heads, 1) for x in keys.contiguous()]
    rows = q.transpose(0, 1)[None].contiguous()
    return (
        lambda _: kernel(q, *keys, start, scale=width**-0.5),
        lambda _: functional.scaled_dot_product_attention(rows, *dense, is_causal=True),
    )


def decodes(
    kernel: NativeCallable, batch: int, length: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> tuple[Call, Call]:
    """A row per sequence, over as many caches in turn as the processor's own cannot hold."""
    size = 2 * batch * length * key_heads * width * dtype.itemsize
    copies = [Paged.of(batch, length, key_heads, width, dtype) for _ in range(-(-COLD_BYTES // size))]
    dense = [copy.contiguous() for copy in copies]
    q = torch.randn(batch, heads, width).to(dtype)
    rows = q.view(batch, key_heads, heads // key_heads, width)
    return (
        lambda number: kernel(q, *copies[number % len(copies)], scale=width**-0.5),
        lambda number: functional.scaled_dot_product_attention(rows, *dense[number % len(dense)]),
    )


def timed(calls: tuple[Call, ...], clock: Callable[[], float], seconds: float) -> list[list[float]]:
    """The times of calls made in turn."""
    times: list[list[float]] = [[] for _ in calls]
    number, until = 0, time.perf_counter() + seconds
    for call in calls:
        call(number)  # which compiles, and grows scratch memory
    while time.perf_counter() < until or number < 5:
        number += 1
        for call, own in zip(calls, times, strict=True):
            start = clock()
            call(number)
            own.append(clock() - start)
    return times


def described(
    dtype: str, heads: tuple[int, int, int], part: str, batch: int, length: int, times: list[list[float]], **work: int
) -> dict[str, Any]:
    best, median = ([of(own) for own in times] for of in (min, statistics.median))
    rates = {name: round(amount / best[0] / 1e9, 1) for name, amount in work.items()}
    return {"dtype": dtype, "heads": heads, "part": part, "batch": batch, "length": length,
            "ours_us": round(best[0] * 1e6, 1), "torch_us": round(best[1] * 1e6, 1),
            "ours_median_us": round(median[0] * 1e6, 1), "torch_median_us": round(median[1] * 1e6, 1),
            "ratio": round(best[1] / best[0], 2), "median_ratio": round(median[1] / median[0], 2)} | rates  # fmt: skip


def text_of(line: dict[str, Any]) -> str:
    heads, key_heads, width = line["heads"]
    rate = f"{line['gflops']:>6} GFLOP/s" if "gflops" in line else f"{line['gb_s']:>6} GB/s   "
    shape = f"{line['dtype']:<4} {heads:>2}/{key_heads} x {width:<3}"
    case = f"{shape} {line['part']:<7} b={line['batch']:<2} n={line['length']:<4}"
    times = [f"{who} {line[f'{who}_us']:>8} ({line[f'{who}_median_us']:>8}) us" for who in ("ours", "torch")]
    return f"{case} {'  '.join(times)}  {rate}  {line['ratio']:.2f}x ({line['median_ratio']:.2f}x) torch"


if __name__ == "__main__":
    main()
