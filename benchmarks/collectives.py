"""Measures all-reduces between ranks of one host: in shared memory, as the CPU kernels do, and with gloo.

    python benchmarks/collectives.py [--ranks 2] [--rounds 2000]

Prints the median microseconds of one all-reduce in float32, on one thread per rank. The figures are of use only on a
machine with an idle core for each rank.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.communicator import make_shared_memory, open_communicator
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library

SIZES = {"2 KB": 512, "64 KB": 16 * 1024, "2 MB": 512 * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--rank", type=int, help="used by the program itself")
    parser.add_argument("--memory", type=int)
    parser.add_argument("--store")
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.ranks, options.rounds, options.memory, options.store)
        return
    memory = make_shared_memory(options.ranks)
    with tempfile.TemporaryDirectory() as folder:
        shared = [f"--memory={memory}", f"--store={folder}/store", f"--ranks={options.ranks}"]
        shared.append(f"--rounds={options.rounds}")
        command = [sys.executable, __file__, *shared]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [
            subprocess.Popen([*command, f"--rank={rank}"], pass_fds=[memory], env=environment)
            for rank in range(options.ranks)
        ]
        if any(rank.wait() for rank in ranks):
            raise SystemExit(1)


def run_rank(rank: int, num_ranks: int, rounds: int, memory: int, store: str) -> None:
    dist.init_process_group("gloo", store=FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    compiler = find_compiler()
    assert compiler is not None, "the benchmark needs a C++ compiler"
    open_communicator(memory, rank, num_ranks, compiler)
    kernel = cpu.KERNELS["all_reduce"]
    library = Library(cpu.KERNELS, Path(cpu.__file__).parent, compiler)
    shared = NativeCallable(kernel, library, reference.KERNELS["all_reduce"])
    # The call list of a step calls the function without Python; `direct` does so as nearly as Python can.
    signature = ctypes.CFUNCTYPE(ctypes.c_char_p, *[ctypes.c_void_p] * 3)
    function = signature(library.address("all_reduce", "f32"))
    for name, size in SIZES.items():
        x = torch.randn(1, size)
        y = torch.empty_like(x)
        tensors = (ctypes.c_void_p * 2)(x.data_ptr(), y.data_ptr())
        numbers = (ctypes.c_int64 * 4)(1, size, size, size)
        calls = {
            "shared memory, native call": partial(function, tensors, numbers, (ctypes.c_double * 1)(0.0)),
            "shared memory, from Python": partial(shared, x, group="tp"),
            "gloo, from Python": partial(dist.all_reduce, y),
        }
        for what, call in calls.items():
            microseconds = median(call, rounds)
            if rank == 0:
                print(f"{name:>6}  {what:<28} {microseconds:9.1f} us")
    dist.destroy_process_group()  # joins gloo's threads: a rank that ends first would end the other one's


def median(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[rounds // 10 :])


if __name__ == "__main__":
    main()
