"""Checks and times all Triton kernels and the engine on the local GPU, and writes one JSON file.

    python benchmarks/gpu.py --out out.json           on a machine with a GPU
    python benchmarks/gpu.py --dry-run                in Triton's interpreter, on tiny sizes; times mean nothing

Requires torch, triton, numpy, safetensors and tokenizers. Each figure is reported next to the ceilings that the same
run measures (a copy, a large GEMM) and to the same work done by torch.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "_dev"), str(ROOT / "tests/kernels/triton")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="run in the interpreter, on tiny sizes")
    parser.add_argument("--skip", nargs="*", default=[], choices=["checks", "kernels", "engine"])
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    prepare(arguments.dry_run)  # before anything imports Triton
    parts: dict[str, Callable[[bool], Any]] = {"checks": check, "kernels": time_kernels, "engine": time_engine}
    report: dict[str, Any] = {"machine": machine(), "dry_run": arguments.dry_run}
    for name, part in parts.items():
        if name not in arguments.skip:
            report[name] = part(arguments.dry_run)
            text = json.dumps(report, indent=1)
            if arguments.out:
                arguments.out.write_text(text + "\n")  # after each part, in case a later one is cut off
    print(text)


def prepare(dry_run: bool) -> None:
    os.environ["SAGELLM_CHECK_DEVICE"] = "cpu" if dry_run else "cuda"
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        from sageLLM.runtime.kernels.triton_interpreter import patch_interpreter

        patch_interpreter()


def machine() -> dict[str, Any]:
    import torch
    import triton
    from machine import machine_facts

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    facts = {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30)} if gpu else {"gpu": None}
    return {**machine_facts(), **facts, "triton": triton.__version__, "cuda": torch.version.cuda}


def check(dry_run: bool) -> dict[str, Any]:
    """The number of checks, and those that failed."""
    import checks

    found = list(checks.batch_invariance_findings() if dry_run else checks.findings())
    bad = [
        f"{one.op} {one.kind} {one.dtype}: error {one.error:.2f} {one.wrong}"
        for one in found
        if one.wrong or one.error > 1
    ]
    return {"checked": len(found), "failed": bad}


def time_kernels(dry_run: bool) -> dict[str, Any]:
    """Microseconds of each call, and the share of the ceilings that it reaches."""
    import torch
    from gpu_kernels import TINY, Scale, works

    from sageLLM.generated.kernels.triton import KERNELS

    device = torch.device("cpu" if dry_run else "cuda")
    copy, gemm = ceilings(dry_run, device)
    table: dict[str, Any] = {"copy, TB/s": copy / 1e12, "bf16 GEMM, TFLOP/s": gemm / 1e12}
    for work in works(KERNELS, TINY if dry_run else Scale(), device):
        seconds = timed(work.ours, dry_run)
        row: dict[str, Any] = {"us": seconds * 1e6, "share of copy": work.bytes / seconds / copy}
        if work.flops:
            row |= {"TFLOP/s": work.flops / seconds / 1e12, "share of GEMM": work.flops / seconds / gemm}
        for name, peer in work.peers.items():
            row[f"{name}, us"] = attempted(lambda peer=peer: timed(peer, dry_run) * 1e6)
        table[work.name] = row
    return table


def ceilings(dry_run: bool, device: Any) -> tuple[float, float]:
    """Bytes per second, read and written, of a copy; operations per second of a large GEMM in bf16."""
    import torch

    count, side = (2**12, 64) if dry_run else (2**29, 8192)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).bfloat16()
    return 2 * count / timed(lambda: target.copy_(source), dry_run), 2 * side**3 / timed(lambda: a @ a, dry_run)


def timed(call: Callable[[], Any], dry_run: bool) -> float:
    """Median seconds of a call; a CUDA graph takes the launch overhead out of the time."""
    import torch

    call()
    if dry_run:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / REPEATS)
    return statistics.median(times)


REPEATS = 5


def attempted(measure: Callable[[], float]) -> float | str:
    """The figure, or the error of a peer that does not run here; our own kernels must run."""
    try:
        return measure()
    except Exception as error:
        return repr(error)[:200]


def time_engine(dry_run: bool) -> dict[str, Any]:
    from gpu_engine import LLAMA_1B, TINY, engine_figures

    if dry_run:
        return engine_figures(TINY, "cpu", (1,), 2)
    return engine_figures(LLAMA_1B, "cuda", (1, 32), 128)


if __name__ == "__main__":
    main()
