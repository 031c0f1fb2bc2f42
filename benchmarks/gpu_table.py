"""Rows of `gpu.py`: timing, ceilings, goals, operands beyond the cache, and overridden constants of kernels."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import read_rows

Call = Callable[[], Any]
Calls = Callable[[], Sequence[Call]]
CACHE_BYTES = 2 * 50 * 10**6
"""Operands of one timing together are larger than this: twice the L2 of an H100 or H200."""
REPEATS, REPLAYS, MAX_COPIES = 5, 15, 64
GOALS = {"norm": 0.93, "decode": 0.87, "prefill": 500 / 798, "gemm": 690 / 798, "linear": 0.82}
"""Fractions of the measured ceilings (copy or GEMM) to reach; `linear` is for an 8B model that decodes one request."""


class Variant(NamedTuple):
    """Constants of a kernel template that replace those of its configuration."""

    template: str
    constants: Mapping[str, int]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.constants.items())


class Table:
    """Appends rows to a file as soon as they are measured. A row that fails has an error instead of figures."""

    def __init__(self, part: str, path: Path, device: torch.device) -> None:
        self.part, self.device, self.is_dry = part, device, device.type == "cpu"
        self._path = path
        self.copy_rate, self.gemm_rate = self._known_ceilings()

    def add(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            figures = dict(measure())
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}"[:300]}
        row = {"part": self.part, "name": name, **figures, "took_s": round(time.perf_counter() - start, 2)}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(shown(row), file=sys.stdout, flush=True)
        return row

    def timed(
        self,
        name: str,
        calls: Calls,
        num_bytes: int,
        flops: int = 0,
        goal: str = "",
        variant: Variant | None = None,
        **peers: Calls,
    ) -> None:
        """A row with the time of a call, its fraction of the ceiling, the goal for it, and the times of peers.

        `calls` makes the same call with different operands, and so does each peer. A variant replaces constants.
        """

        def measure() -> dict[str, Any]:
            if variant and not configured():
                return {"skipped": "kernels without a table of configurations"}
            with constants(variant) if variant else nullcontext():
                made = calls()
                start = time.perf_counter()
                made[0]()
                self.synchronize()
                first = time.perf_counter() - start
                seconds = self.seconds(made)
            row: dict[str, Any] = {"us": seconds * 1e6, "first_call_s": round(first, 3)}
            row |= self.fractions(seconds, num_bytes, flops, goal)
            del made
            for peer, peer_calls in peers.items():
                row[f"{peer}_us"] = attempted(lambda peer_calls=peer_calls: self.seconds(peer_calls()) * 1e6)
            return row

        self.add(name + ("" if variant is None else f", {variant}"), measure)

    def fractions(self, seconds: float, num_bytes: int, flops: int, goal: str) -> dict[str, Any]:
        row: dict[str, Any] = {"TB/s": num_bytes / seconds / 1e12}
        reached = num_bytes / seconds / self.copy_rate
        if flops:
            row["TFLOP/s"] = flops / seconds / 1e12
            reached = flops / seconds / self.gemm_rate
        row["of GEMM" if flops else "of copy"] = reached
        if self.is_dry:
            return row
        if not self.is_measured:
            row["ceilings"] = "those of an H100: the part `ceilings` has not run"
        return {**row, "goal": round(GOALS[goal], 3), "is_met": reached >= GOALS[goal]} if goal else row

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median seconds of a call. A CUDA graph of all calls takes the time of launches out."""
        if self.is_dry:
            start = time.perf_counter()
            calls[0]()
            return time.perf_counter() - start
        for call in calls[:2]:
            call()
        count = max(REPEATS, len(calls))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                calls[i % len(calls)]()
        times = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / count)
        return statistics.median(times)

    def synchronize(self) -> None:
        if not self.is_dry:
            torch.cuda.synchronize()

    def _known_ceilings(self) -> tuple[float, float]:
        """Bytes and operations per second as the part `ceilings` has measured them, or the data sheet of an H100."""
        rates = {"copy": 3.0e12, "bf16 GEMM": 7.98e14}
        self.is_measured = False
        for row in read_rows(self._path):
            if row["part"] == "ceilings" and "rate" in row:
                rates[row["name"]] = row["rate"]
                self.is_measured = True
        return rates["copy"], rates["bf16 GEMM"]


def rotated(make: Callable[[], Sequence[Any]], call: Callable[..., Any]) -> Calls:
    """The call on as many sets of operands as are larger than the cache together."""

    def calls() -> list[Call]:
        sets = [make()]
        num_bytes = sum(x.nbytes for x in sets[0])
        count = 1 if sets[0][0].device.type == "cpu" else min(MAX_COPIES, 1 + CACHE_BYTES // max(num_bytes, 1))
        sets += [make() for _ in range(count - 1)]
        return [lambda operands=operands: call(*operands) for operands in sets]

    return calls


def attempted(measure: Callable[[], float]) -> float | str:
    """The figure, or the error of a peer that does not run here."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


@contextmanager
def constants(variant: Variant) -> Iterator[None]:
    """Replaces constants of a kernel template, such as SPLIT and STAGES of "paged_decode", in all its launchers."""
    originals = {module: module.choose for module in configured()}

    def replaced(original: Any) -> Any:
        def choose(name: str, **sizes: int) -> Any:
            use = original(name, **sizes)
            if use is None or name != variant.template:
                return use
            if unknown := variant.constants.keys() - use.keys():
                raise ValueError(f"{name} has the constants {', '.join(use)}, got {', '.join(unknown)}")
            return {**use, **variant.constants}

        return choose

    try:
        for module, original in originals.items():
            module.choose = replaced(original)
        yield
    finally:
        for module, original in originals.items():
            module.choose = original


def configured() -> list[Any]:
    """The modules of kernels that choose among configurations."""
    return [module for name, module in sys.modules.items() if "kernels.triton." in name and hasattr(module, "choose")]


def shown(row: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    figures = ", ".join(f"{name} {text(value)}" for name, value in row.items() if name not in ("part", "name"))
    return f"{row['part']}: {row['name']}: {figures}"
