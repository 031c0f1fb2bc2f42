"""Measures the generated CPU kernels: row kernels against torch's own, cold compile time, lines per kernel.

`attention_cpu.py` and `linear_cpu.py` have the others.

Times are minima over alternating runs, in microseconds of this thread's processor time.
    python benchmarks/kernels_cpu.py
"""

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.compiler import Compiler, find_compiler
from sageLLM.runtime.kernels.cpu.library import Library

SOURCES, SPECS = Path(cpu.__file__).parent, Path(__file__).parents[1] / "specs/ops"
LLAMA = ("embedding", "rms_norm", "fused_add_rms_norm", "qk_rope_kv_store", "paged_prefill_attention",
         "paged_decode_attention", "linear_silu_mul", "linear", "lm_head_sample", "select_rows", "add")  # fmt: skip
Run = Callable[[], object]


def main() -> None:
    torch.set_num_threads(1)
    compiler = find_compiler()
    assert compiler is not None, "these kernels need a C++ compiler"
    library = Library(cpu.KERNELS, SOURCES, compiler)
    kernels = {name: NativeCallable(kernel, library, reference.KERNELS[name]) for name, kernel in cpu.KERNELS.items()}
    print(f"{'kernel':44} {'ours':>9} {'torch':>9}  us")
    for name, ours, theirs in rows(kernels):
        print(f"{name:44} {{:9.1f}} {{:9.1f}}".format(*fastest(ours, theirs)))
    print_compile_times(compiler)
    print_sizes()


def fastest(*runs: Run, rounds: int = 9) -> list[float]:
    """The least time of each, run in turns."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds + 1):  # the first round compiles, and fills caches
        for i, run in enumerate(runs):
            start = time.thread_time()
            run()
            best[i] = min(best[i], (time.thread_time() - start) * 1e6)
    return best


def rows(kernels: dict[str, NativeCallable]) -> Iterator[tuple[str, Run, Run]]:
    """The row kernels at the sizes of SmolLM-135M, one token and a prompt of 1024."""
    for tokens in (1, 1024):
        x, w, gu = (torch.randn(shape).bfloat16() for shape in ((tokens, 576), (576,), (tokens, 3072)))
        yield (
            f"rms_norm [{tokens}, 576]",
            lambda x=x, w=w: kernels["rms_norm"](x, w),
            lambda x=x, w=w: functional.rms_norm(x, (576,), w),
        )
        yield (f"fused_add_rms_norm [{tokens}, 576]", lambda x=x, w=w: kernels["fused_add_rms_norm"](x, x, w),
               lambda x=x, w=w: functional.rms_norm(x + x, (576,), w))  # fmt: skip
        yield (f"silu_mul [{tokens}, 2*1536]", lambda gu=gu: kernels["silu_mul"](gu),
               lambda gu=gu: functional.silu(gu[:, :1536]) * gu[:, 1536:])  # fmt: skip


def print_compile_times(compiler: Compiler) -> None:
    sources = {cpu.KERNELS[op].source for op in LLAMA}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SAGELLM_CACHE_DIR"] = folder
        for state in ("cold", "cached"):
            start, cpu_start = time.perf_counter(), os.times()
            Library(cpu.KERNELS, SOURCES, compiler).prepare(LLAMA, "bf16")
            spent = os.times()
            seconds = spent.children_user + spent.children_system - cpu_start.children_user - cpu_start.children_system
            wall = time.perf_counter() - start
            print(f"{len(sources)} files of a llama in bf16, {state}: {wall:.2f} s wall, {seconds:.2f} s of compilers")


def print_sizes() -> None:
    """Lines of YAML per op and of C++ per kernel, and of the hand-written headers."""
    yaml = sum(len(path.read_text().splitlines()) for path in SPECS.glob("*.yaml"))
    ops = sum(len(re.findall(r"^  \w+:$", path.read_text(), re.MULTILINE)) for path in SPECS.glob("*.yaml"))
    cpp = sum(len(path.read_text().splitlines()) for path in SOURCES.glob("*.cpp"))
    headers = Path(cpu.__file__).parents[3] / "runtime/kernels/cpu"
    own = sum(len(path.read_text().splitlines()) for path in headers.glob("*.h"))
    print(f"{yaml / ops:.1f} lines of YAML per op ({ops}), {cpp / len(cpu.KERNELS):.1f} of C++ per kernel "
          f"({len(cpu.KERNELS)}), {own} lines of headers")  # fmt: skip


if __name__ == "__main__":
    main()
