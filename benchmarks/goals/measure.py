"""The figures of the CPU goals that are ratios of times of this engine, each measured within one process.

Every function returns figures by name. Times are the best of several, taken in turns where they are compared: other
work on the machine only lengthens them.
"""

import ctypes
import itertools
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Figures = dict[str, Any]
CONTEXT, CHUNK, NUM_DECODES = 256, 512, 16
PROMPT = 1024


class Steps:
    """Steps of an engine with nothing else running in it; every prompt is one step."""

    def __init__(self, folder: Path) -> None:
        from sageLLM import LLM
        from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig

        scheduler = PDSchedulerConfig(mode="hybrid", prefill_chunk_size=4096)
        self.llm: Any = LLM(folder, skip_tokenizer=True, enable_prefix_caching=False, scheduler=scheduler)
        self._numbers = itertools.count()

    def add(self, length: int, num_new: int) -> None:
        """A request whose prompt differs from all others."""
        from sageLLM import SamplingParams

        number = next(self._numbers)
        ids = [(11 * i + 7 * number) % (self.llm.model.config.V - 10) + 5 for i in range(length)]
        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        self.llm.engine.add(f"step-{number}", None, ids, params)

    def step(self) -> float:
        """Runs one step; its seconds."""
        start = time.perf_counter()
        self.llm.engine.step()
        return time.perf_counter() - start

    def finish(self) -> list[float]:
        """The seconds of all steps that are left."""
        times = []
        while self.llm.engine.has_work:
            times.append(self.step())
        return times


def hybrid(folder: Path, rounds: int = 8) -> Figures:
    """A step of 16 decodes, one of a chunk alone, and one of both; `of_sum` is the sum of the parts over both together.

    The contexts of the decodes are the same in the steps that are compared. The engine plans a step while another runs,
    so that the step of both is not the first one after the chunk has come, but the longest.
    """
    steps = Steps(folder)
    found: dict[str, list[float]] = {"decode": [], "chunk": [], "mixed": []}
    for number in range(rounds + 1):  # the first round compiles plans and grows memory
        for _ in range(NUM_DECODES):
            steps.add(CONTEXT, 16)
        before = [steps.step() for _ in range(8)][3:]
        steps.add(CHUNK, 1)
        both = steps.finish()
        steps.add(CHUNK, 1)
        alone = sum(steps.finish())
        if number:
            found["decode"].append(statistics.median(before))
            found["chunk"].append(alone)
            found["mixed"].append(max(both))
    ratios = [(a + b) / c for a, b, c in zip(*found.values(), strict=True)]
    best = {name: min(times) for name, times in found.items()}
    return {
        **{f"{name}_ms": round(seconds * 1e3, 2) for name, seconds in best.items()},
        "of_sum": round((best["decode"] + best["chunk"]) / best["mixed"], 3),
        "of_sum_median": round(statistics.median(ratios), 3),
        "tokens_s": round((NUM_DECODES + CHUNK) / best["mixed"], 1),
    }


def first_prefill(folder: Path, later: int = 5) -> Figures:
    """The first prompt after loading and later ones of the same length, with the page faults of each.

    Seconds are those of processor time of this process, which other work on the machine disturbs less, and `wall` ones.
    """
    steps = Steps(folder)
    wall, spent, faults = [], [], []
    for _ in range(later + 1):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        steps.add(PROMPT, 1)
        steps.finish()
        after = resource.getrusage(resource.RUSAGE_SELF)
        wall.append(time.perf_counter() - start)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        faults.append(after.ru_minflt - before.ru_minflt)
    return {
        "first_ms": round(wall[0] * 1e3, 1),
        "later_ms": round(statistics.median(wall[1:]) * 1e3, 1),
        "of_later": round(statistics.median(wall[1:]) / wall[0], 3),
        "of_later_processor": round(statistics.median(spent[1:]) / spent[0], 3),
        "first_faults": faults[0],
        "later_faults": statistics.median(faults[1:]),
    }


def profile(folder: Path, rounds: int = 4) -> Figures:
    """Time of each op and its fractions of the machine's limits, in a prompt of PROMPT tokens and in decodes.

    The limits are measured in the same process, before and after; the best counts. Bytes are those that an op must
    read and write, at the rate of reads, which is the largest.
    """
    steps, machine = Steps(folder), limits()
    found = {"prefill": [], "decode 1": [], "decode 16": []}
    for number in range(rounds + 1):  # the first round grows memory
        one = {
            "prefill": recorded(steps, "prefill", [(PROMPT, 1)]),
            "decode 1": recorded(steps, "decode", [(CONTEXT, 12)]),
            "decode 16": recorded(steps, "decode", [(CONTEXT, 12)] * NUM_DECODES),
        }
        for stage, total in one.items() if number else ():
            found[stage].append(total)
    machine = {name: max(rate, machine[name]) for name, rate in limits().items()}
    return {"limits": {name: round(rate / 1e9, 1) for name, rate in machine.items()}} | {
        stage: stage_figures(totals, machine) for stage, totals in found.items()
    }


def limits() -> dict[str, float]:
    """Bytes per second of reads, and operations per second in bf16, of all threads."""
    from sageLLM.runtime.bench.machine import this_machine

    machine = this_machine()
    return {"read_gb_s": machine.memory_bandwidth, "peak_gflop_s": machine.peak_flops["bf16"]}


def recorded(steps: Steps, stage: str, asks: list[tuple[int, int]]) -> Any:
    """The times of a stage's steps while requests of these lengths of prompts and answers run."""
    from sageLLM.generated.hardware import HARDWARE
    from sageLLM.runtime.bench.profile import profiled

    with profiled(steps.llm, HARDWARE["cpu"]) as one:
        for length, num_new in asks:
            steps.add(length, num_new)
        steps.finish()
    return one.stages[stage]


def stage_figures(totals: list[Any], machine: dict[str, float]) -> Figures:
    """The shortest round of a stage, per step, and the shortest time of each op.

    `in_kernels` is the part of the step's time that is spent in calls of kernels.
    """
    best = min(totals, key=lambda total: total.seconds / total.steps)
    ops = {}
    for op in best.ops:
        one = min((total.ops[op] for total in totals), key=lambda spent: spent.seconds)
        flops, num_bytes = one.flops / one.seconds, one.bytes / one.seconds
        ops[op] = {
            "calls": one.calls // best.steps,
            "ms": round(one.seconds / best.steps * 1e3, 3),
            "of_peak": round(flops / machine["peak_gflop_s"], 3),
            "of_reads": round(num_bytes / machine["read_gb_s"], 3),
        }
    in_kernels = sum(one.seconds for one in best.ops.values())
    return {
        "ms": round(best.seconds / best.steps * 1e3, 3),
        "in_kernels": round(in_kernels / best.seconds, 3),
        "ops": ops,
    }


def reads(folder: Path, rounds: int = 6, length: int = 16) -> Figures:
    """Decode steps of one request beside plain reads of the same packed weights, `length` of each in turn.

    The reads go through the weights in the order of a step, as one parallel loop for each weight, and as one loop for
    all bytes (`whole`): the first has the step's barriers between ops, the second has none.
    """
    steps = Steps(folder)
    read = WeightReads(steps.llm)
    found: dict[str, list[float]] = {"step": [], "by_weight": [], "whole": []}
    for _ in range(rounds):
        steps.add(CONTEXT - length // 2, length + 4)
        found["step"] += steps.finish()[3:-1]
        found["by_weight"] += [read.by_weight() for _ in range(length)]
        found["whole"] += [read.whole() for _ in range(length)]
    best = {name: quantile(times) for name, times in found.items()}
    return {
        "weights_mb": round(read.num_bytes / 1e6, 1),
        **{f"{name}_ms": round(seconds * 1e3, 3) for name, seconds in best.items()},
        **{f"{name}_gb_s": round(read.num_bytes / seconds / 1e9, 1) for name, seconds in best.items()},
        "of_by_weight": round(best["by_weight"] / best["step"], 3),
        "of_whole": round(best["whole"] / best["step"], 3),
    }


def quantile(times: list[float], part: float = 0.1) -> float:
    """The time below which a tenth of them is: steps overlap a little, so that the least is too short."""
    return sorted(times)[int(part * len(times))]


class WeightReads:
    """Plain reads of a model's packed weights on the threads of its kernels."""

    def __init__(self, llm: Any) -> None:
        from sageLLM.runtime.executor.kernel_choice import make_runner
        from sageLLM.runtime.kernels.cpu.packing import PackedWeight
        from sageLLM.runtime.registry.plugins import load_registry

        weights = {id(w): w for w in llm.model.weights.values() if isinstance(w, PackedWeight)}
        self._values = [one.values for one in weights.values()]
        self.num_bytes = sum(one.nbytes for one in self._values)
        self._threads = torch.get_num_threads()
        self._read = make_runner(load_registry()).library.helper("limits.cpp", "limit_read", "f32")
        self._totals = torch.zeros(64)
        self._all = torch.ones(self.num_bytes // 4)

    def by_weight(self) -> float:
        """Seconds of reading each weight in turn."""
        return self._seconds([self._call(one) for one in self._values])

    def whole(self) -> float:
        """Seconds of reading as many bytes of one array."""
        return self._seconds([self._call(self._all)])

    def _call(self, data: torch.Tensor) -> Callable[[], Any]:
        pointers = (ctypes.c_void_p * 2)(data.data_ptr(), self._totals.data_ptr())
        sizes = (ctypes.c_int64 * 4)(data.nbytes, 4 * self._threads, 1, 1)
        return lambda: self._read(pointers, sizes, None)

    def _seconds(self, calls: list[Callable[[], Any]]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start


def float_attention(seconds: float = 0.5) -> Figures:
    """Decode attention in float32 at width 128 against torch's, one thread, in turns (`attention_cpu.py`)."""
    import attention_cpu

    torch.set_num_threads(1)
    lines = attention_cpu.measure(["f32"], "decode", time.thread_time, seconds)
    ratios = {f"{one['batch']} x {one['length']}": one["ratio"] for one in lines if one["heads"][2] == 128}
    mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
    return {"least": min(ratios.values()), "mean": round(mean, 3), "ratios": ratios}


def start_up(folder: Path, runs: int = 5) -> Figures:
    """From the start of Python to the first token in new processes, the fastest of them, and its memory."""
    import start_up as one

    one.run(folder)  # compiles the kernels and the bytecode
    best = min((one.run(folder) for _ in range(runs)), key=lambda row: row["total"])
    return start_figures(best)


def first_start(folder: Path) -> Figures:
    """The same with an empty cache of kernels, in one process."""
    import start_up as one

    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"SAGELLM_CACHE_DIR": cache}):
        return start_figures(one.run(folder))


def start_figures(row: dict[str, float]) -> Figures:
    """Seconds and megabytes; memory also as a multiple of the weights, next to which the KV of 9 tokens is small."""
    found = {name.replace(" ", "_"): round(value, 3) for name, value in row.items()}
    return found | {"peak_of_weights": round(row["peak MB"] / row["weights MB"], 3)}
