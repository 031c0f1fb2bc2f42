"""Peak rates of the machine: memory reads and bfloat16 GEMM, measured with torch.

    python benchmarks/peers/roofline.py THREADS

Runs as a separate process before and after the engines; prints JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    table = torch.ones(2**28)
    read_gbs = table.nbytes / _best_seconds(table.sum, 5) / 1e9
    x = torch.randn(1024, 1024, dtype=torch.bfloat16)
    w = torch.randn(3072, 1024, dtype=torch.bfloat16)
    flops = 2 * x.shape[0] * w.numel()
    gemm_gflops = flops / _best_seconds(lambda: torch.nn.functional.linear(x, w), 20) / 1e9
    print(json.dumps({"read_gb_per_s": round(read_gbs, 1), "gemm_gflop_per_s": round(gemm_gflops)}))


def _best_seconds(run: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


if __name__ == "__main__":
    main(int(sys.argv[1]))
