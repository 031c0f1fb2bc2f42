"""Measures this machine and makes a hardware entry of it: limits, link, and efficiencies fitted to our kernels."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import msgspec

from sageLLM.runtime.bench.limits import MachineLimits
from sageLLM.runtime.bench.rank import RankResult, RankSpec
from sageLLM.runtime.core.cost import Efficiency, Hardware, Link
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.kernels.cpu.communicator import make_shared_memory
from sageLLM.runtime.loader.model import DTYPES, SHORT_NAMES
from sageLLM.runtime.sim.calibration.fit import fit
from sageLLM.runtime.sim.calibration.kernel_times import AllReduce, Measured, Row

SMALL_BYTES = 16384
"""Kernels of at most so many bytes take about as long as a kernel without work."""


@dataclass(frozen=True, slots=True)
class HardwareRequest:
    """Arguments of a measurement by `ranks` processes of `threads` threads, as ranks of a tensor-parallel group."""

    name: str = "measured"
    ranks: int = 1
    threads: int | None = None
    dtype: str = "bfloat16"
    runs: int = 3
    seconds: float = 0.3
    disk_folder: Path | None = None

    @property
    def threads_per_rank(self) -> int:
        """By default an equal share of the cores."""
        return self.threads or max(1, num_cores() // self.ranks)


@dataclass(frozen=True, slots=True)
class MeasuredHardware:
    """The entry, the limits of one rank, and the kernels that the entry is fitted to."""

    hardware: Hardware
    limits: MachineLimits
    kernels: Measured


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_hardware(request: HardwareRequest) -> MeasuredHardware:
    """Measures and fits; takes about a minute. Raises SageError if a process fails, with its message."""
    if request.dtype not in DTYPES:
        raise SageError(f"dtype must be one of {', '.join(DTYPES)}, got {request.dtype}")
    parts = ["limits", "kernels"]
    results = _run_ranks(
        request, request.ranks, request.threads_per_rank, [*parts, "link"] if request.ranks > 1 else parts
    )
    link_threads = max(1, num_cores() // 2)
    linked = results if request.ranks > 1 else _run_ranks(request, 2, link_threads, ["link"])
    limits = _mean_limits([result.limits for result in results if result.limits is not None])
    measured = Measured(
        kernels={family: [Row(*row) for row in rows] for family, rows in results[0].kernels.items()},
        all_reduces=[AllReduce(size, len(linked), seconds) for size, seconds in linked[0].all_reduces],
        dtype=SHORT_NAMES[DTYPES[request.dtype]],
    )
    return MeasuredHardware(fit(measured, _limits_entry(request.name, limits, measured)), limits, measured)


def _run_ranks(request: HardwareRequest, num_ranks: int, threads: int, parts: list[str]) -> list[RankResult]:
    """The results of `num_ranks` processes that measure at the same time."""
    memory = make_shared_memory(num_ranks) if num_ranks > 1 else None
    folder = None if request.disk_folder is None else str(request.disk_folder)
    specs = [
        RankSpec(rank, num_ranks, threads, memory, parts, request.dtype, request.runs, request.seconds, folder)
        for rank in range(num_ranks)
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    processes = [_start(spec, environment) for spec in specs]
    if memory is not None:
        os.close(memory)
    try:
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            lines = errors.strip().splitlines()
            raise SageError(
                f"a measuring process failed: {lines[-1] if lines else f'exit status {process.returncode}'}"
            )
    return [msgspec.json.decode(output.splitlines()[-1], type=RankResult) for output, _ in outputs]


def _start(spec: RankSpec, environment: dict[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "sageLLM.runtime.bench.rank", msgspec.json.encode(spec).decode()]
    pipe = subprocess.PIPE
    inherited = [] if spec.memory is None else [spec.memory]
    return subprocess.Popen(command, env=environment, pass_fds=inherited, stdout=pipe, stderr=pipe, text=True)


def _mean_limits(limits: Sequence[MachineLimits]) -> MachineLimits:
    """The mean of the ranks."""
    first = limits[0]
    rates = {
        one.name: sum(getattr(rank, one.name) for rank in limits) / len(limits)
        for one in fields(first)
        if one.name not in ("threads", "multiply")
    }
    multiply = {name: sum(rank.multiply[name] for rank in limits) / len(limits) for name in first.multiply}
    return replace(first, **rates, multiply=multiply)


def _limits_entry(name: str, limits: MachineLimits, measured: Measured) -> Hardware:
    """The entry before the fit. Reading is the bandwidth: a decode step writes little."""
    small = [row.seconds for row in measured.kernels.get("default", []) if row.num_bytes <= SMALL_BYTES]
    launch_us = sorted(small)[len(small) // 2] * 1e6 if small else 5.0
    peak = limits.peak_flops or {"f32": 1e11}
    return Hardware(
        name=name,
        peak_flops={dtype: _rounded(rate) for dtype, rate in peak.items()},
        memory_bandwidth=_rounded(limits.read),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        launch_overhead_us=_rounded(launch_us),
        link=Link(_rounded(limits.copy / 2), 5.0),
        host_link=Link(_rounded(limits.copy / 2), _rounded(launch_us)),
        disk_link=Link(_rounded(limits.disk_read), 100.0) if limits.disk_read else None,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def as_yaml(found: MeasuredHardware, source: str) -> str:
    """The entry in the form of `specs/hardware`."""
    one, threads = found.hardware, found.limits.threads
    peaks = ", ".join(f"{dtype}: {_number(rate)}" for dtype, rate in one.peak_flops.items())
    lines = [
        "schema: hardware/v1",
        f"hardware: {one.name}",
        f"summary: This machine, with {threads} thread{'s' if threads > 1 else ''} per rank.",
        f"source: {source}",
        f"peak_flops: {{{peaks}}}",
        f"memory_bandwidth: {_number(one.memory_bandwidth)}",
        f"memory_bytes: {one.memory_bytes}",
        f"launch_overhead_us: {one.launch_overhead_us:g}",
        _link_line("link", one.link),
        _link_line("host_link", one.host_link),
    ]
    if one.disk_link is not None:
        lines.append(_link_line("disk_link", one.disk_link))
    lines.append("efficiency:")
    lines += [f"  {family}: {_efficiency(value)}" for family, value in one.efficiency.items()]
    return "\n".join(lines) + "\n"


def _link_line(name: str, link: Link) -> str:
    return f"{name}: {{bandwidth: {_number(link.bandwidth)}, latency_us: {link.latency_us:g}}}"


def _efficiency(one: Efficiency) -> str:
    changed = {f.name: getattr(one, f.name) for f in fields(one) if getattr(one, f.name) != f.default}
    return f"{{{', '.join(f'{name}: {value:.3g}' for name, value in changed.items())}}}"


def _number(value: float) -> str:
    """YAML takes 1e+11 for a text, and 1.0e+11 for a number."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa}e{int(exponent):+d}"
