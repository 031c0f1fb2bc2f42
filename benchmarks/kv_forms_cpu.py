"""Times attention on the CPU over KV caches of codes, in turn with a cache of elements.

python benchmarks/kv_forms_cpu.py [--part decode] [--threads 1] [--seconds 1]

Shapes, cold keys and clocks are those of attention_cpu.py. The table shows the best time with elements, and the best
times with codes divided by it.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from attention_cpu import COLD_BYTES, DTYPES, HEADS, Call, Paged, timed

from sageLLM.generated.kernels import cpu, reference
from sageLLM.generated.kernels.reference.kv_forms import kv_rows
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.kernels.kv_codes import TORCH_TYPES

DTYPE = DTYPES["bf16"]
DECODES, PROMPTS = ((1, 512), (1, 2048), (16, 512), (16, 2048)), (256, 1024)


def in_forms(elements: list[Paged]) -> Iterator[list[Paged]]:
    """The caches as elements, and in each form of codes."""
    yield elements
    for dtype in TORCH_TYPES.values():
        like = torch.empty(0, dtype=dtype)
        yield [one._replace(k=kv_rows(one.k, like), v=kv_rows(one.v, like)) for one in elements]


def decodes(kernel: NativeCallable, batch: int, length: int, heads: int, key_heads: int, width: int) -> list[Call]:
    copies = -(-COLD_BYTES // (2 * batch * length * key_heads * width * DTYPE.itemsize))
    caches = [Paged.of(batch, length, key_heads, width, DTYPE) for _ in range(2 * copies)]
    q = torch.randn(batch, heads, width).to(DTYPE)
    return [
        lambda number, own=own: kernel(q, *own[number % len(own)], scale=width**-0.5)  # type: ignore[misc]
        for own in in_forms(caches)
    ]


def prefills(kernel: NativeCallable, length: int, heads: int, key_heads: int, width: int) -> list[Call]:
    keys = Paged.of(1, length, key_heads, width, DTYPE)
    q, start = torch.randn(length, heads, width).to(DTYPE), torch.tensor([0, length], dtype=torch.int32)
    return [
        lambda _, own=own: kernel(q, *own[0], start, scale=width**-0.5)  # type: ignore[misc]
        for own in in_forms([keys])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["prefill", "decode"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line of the table")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    compiler = find_compiler()
    assert compiler is not None, "these kernels need a C++ compiler"
    library = Library(cpu.KERNELS, Path(cpu.__file__).parent, compiler)
    prefill, decode = (
        NativeCallable(cpu.KERNELS[name], library, reference.KERNELS[name])
        for name in ("paged_prefill_attention", "paged_decode_attention")
    )
    for heads in HEADS:
        cases = {f"decode {batch} x {n}": decodes(decode, batch, n, *heads) for batch, n in DECODES}
        if given.part == "prefill":
            cases.clear()
        if given.part != "decode":
            cases |= {f"prefill {n}": prefills(prefill, n, *heads) for n in PROMPTS}
        for name, calls in cases.items():
            plain, *codes = (min(own) for own in timed(tuple(calls), clock, given.seconds))
            ratios = "  ".join(f"{form.name} {own / plain:.2f}" for form, own in zip(TORCH_TYPES, codes, strict=True))
            print(
                f"{heads[0]:>2}/{heads[1]} x {heads[2]:<3} {name:<16} bf16 {plain * 1e6:>8.0f} us  {ratios}", flush=True
            )


if __name__ == "__main__":
    main()
