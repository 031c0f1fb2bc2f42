"""Cost of streams in the native runner: calls, waits between streams, and copies next to computation.

    python benchmarks/streams.py

Prints microseconds, the medians of several runs. Every call fills memory, and serves as a copy and as computation.
"""

import statistics
from time import perf_counter

import torch

from sageLLM.runtime.executor.kernel_choice import make_runner
from sageLLM.runtime.executor.native.calls import CallList
from sageLLM.runtime.executor.native.locations import contiguous
from sageLLM.runtime.kernels.cpu.native import NativeRunner
from sageLLM.runtime.registry.plugins import load_registry

NUM_CALLS, RUNS = 400, 31
SMALL, LARGE = 64, 2**18


def main() -> None:
    runner = make_runner(load_registry())
    plain = seconds(runner, [(0, ()) for _ in range(NUM_CALLS)], SMALL)
    waits = seconds(runner, [(i % 2, (i - 1,) if i else ()) for i in range(NUM_CALLS)], SMALL)
    forked = seconds(runner, [(1, ()), *((0, ()) for _ in range(NUM_CALLS - 1))], SMALL)
    alone = seconds(runner, [(0, ()) for _ in range(64)], LARGE)
    halves = seconds(runner, [(i % 2, ()) for i in range(64)], LARGE)
    show("400 calls of 64 bytes in one stream", plain, f"{plain * 1e9 / NUM_CALLS:.0f} ns a call")
    show("the same in turns of two streams", waits, f"{(waits - plain) * 1e9 / (NUM_CALLS - 1):.0f} ns a wait")
    show("one of them in a second stream, without a wait", forked, f"{(forked - plain) * 1e6:+.1f} us")
    show("64 fills of 256 KiB in one stream", alone, "")
    show("the same, half of them in a second stream", halves, f"{alone / halves:.2f} times as fast")


def show(what: str, time_s: float, detail: str) -> None:
    print(f"{what:<48}{time_s * 1e6:9.1f} us  {detail}".rstrip())


def seconds(runner: NativeRunner, calls: list[tuple[int, tuple[int, ...]]], num_bytes: int) -> float:
    """The median time of a run of calls, each a stream and its waits; every call fills its own memory."""
    call_list, memory = CallList(), torch.zeros(len(calls), num_bytes, dtype=torch.uint8)
    for number, (stream, waits) in enumerate(calls):
        location = contiguous(f"memory {number}", "i8", (num_bytes,))
        call_list.add(runner.poison_address, [location], [num_bytes], [], stream, waits)
    call_list.finish()
    call_list.fill(call_list.formulas.values({}), [row.data_ptr() for row in memory])
    all_calls = range(len(calls))
    num_streams = call_list.num_streams(all_calls)
    times = []
    for _ in range(RUNS):
        start = perf_counter()
        runner.run(call_list.address, 0, len(calls), num_streams)
        times.append(perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
