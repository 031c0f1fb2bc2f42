"""Limits of the machine in this run, by code of ours: memory reads and multiply-adds on all threads.

    python benchmarks/peers/roofline.py THREADS

Runs as a separate process before and after the engines; prints JSON.
"""

import json
import sys
from pathlib import Path

import torch

from sageLLM.generated.kernels import cpu
from sageLLM.runtime.bench.limits import measure_limits
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    limits = measure_limits(Library(cpu.KERNELS, Path(cpu.__file__).parent, find_compiler()), seconds=0.5)
    multiply = {name: round(rate / 1e9, 1) for name, rate in limits.multiply.items()}
    print(json.dumps({"read_gb_s": round(limits.read / 1e9, 2), "gflop_s": multiply}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
