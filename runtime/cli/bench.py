"""Runs the measurements of `sagellm bench` and prints them."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sageLLM.runtime.bench.hardware import HardwareRequest, MeasuredHardware, as_yaml, measure_hardware
from sageLLM.runtime.bench.offline import Latency, Throughput, measure_latency, measure_throughput
from sageLLM.runtime.bench.steps import StepTimer, as_table
from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.hardware_entry import find_hardware
from sageLLM.runtime.engine.llm import LLM
from sageLLM.runtime.errors import EngineError, SageError
from sageLLM.runtime.sim.calibration.report import as_table as as_error_table
from sageLLM.runtime.sim.calibration.report import family_errors


@dataclass(frozen=True, slots=True)
class OfflineRequest:
    """Arguments that `bench throughput` and `bench latency` share."""

    model: Path
    engine: EngineOptions
    input_len: int
    output_len: int
    seed: int
    output_json: Path | None
    as_json: bool

    def load(self) -> LLM:
        """The engine, without a tokenizer and a prefix cache: prompts are random ids."""
        return self.engine.load(self.model, skip_tokenizer=True)

    def print(self, found: Throughput | Latency) -> None:
        """Prints and writes the figures."""
        data = json.dumps(found.as_data(), indent=4)
        print(data if self.as_json else found)
        if self.output_json is not None:
            self.output_json.write_text(data + "\n", encoding="utf-8")


def bench_throughput(request: OfflineRequest, num_prompts: int) -> int:
    """Prints requests and tokens per second."""

    def run() -> None:
        llm = request.load()
        request.print(measure_throughput(llm, num_prompts, request.input_len, request.output_len, request.seed))

    return _reporting_errors(run)


def bench_latency(request: OfflineRequest, batch_size: int, num_warmups: int, num_iters: int) -> int:
    """Prints the mean and the percentiles of the latency."""

    def run() -> None:
        lengths = request.input_len, request.output_len
        request.print(measure_latency(request.load(), batch_size, *lengths, num_warmups, num_iters, request.seed))

    return _reporting_errors(run)


def bench_steps(model: Path, hardware: str, rounds: int, engine: EngineOptions, *, as_json: bool) -> int:
    """Prints measured and predicted times of steps."""

    def run() -> None:
        options = engine.arguments()
        del options["scheduler"]
        del options["enable_prefix_caching"]
        errors = list(StepTimer(model, find_hardware(hardware), rounds, **options).errors())
        print(json.dumps([one.as_data() for one in errors], indent=1) if as_json else as_table(errors))

    return _reporting_errors(run)


def bench_hardware(request: HardwareRequest, out: Path | None, *, as_json: bool) -> int:
    """Writes the entry to the file or to stdout; with `as_json` the limits go to stdout, else as text to stderr."""

    def run() -> None:
        found = measure_hardware(request)
        text = as_yaml(found, _source(request))
        if out is not None:
            out.write_text(text, encoding="utf-8")
        if as_json:
            print(json.dumps(limits_data(found), indent=1))
            return
        print("\n".join(f"{name:<16}{value:>12,.1f}" for name, value in limits_data(found).items()), file=sys.stderr)
        print("\nfitted efficiencies, predicted / measured - 1:", file=sys.stderr)
        print(as_error_table(family_errors(found.kernels, found.hardware)), file=sys.stderr)
        if out is None:
            print(text, end="")

    return _reporting_errors(run)


def limits_data(found: MeasuredHardware) -> dict[str, float]:
    """The limits in GB/s, GFLOP/s and microseconds, by name."""
    limits, link = found.limits, found.hardware.link
    rates = {f"{name}_gb_s": getattr(limits, name) for name in ("read", "write", "copy", "l2_read", "l3_read")}
    rates |= {"disk_read_gb_s": limits.disk_read, "link_gb_s": link.bandwidth}
    rates |= {f"{name}_gflop_s": rate for name, rate in limits.multiply.items()}
    figures = {name: round(rate / 1e9, 2) for name, rate in rates.items()}
    return figures | {"link_us": link.latency_us, "launch_us": found.hardware.launch_overhead_us}


def _source(request: HardwareRequest) -> str:
    day = datetime.now(UTC).date().isoformat()
    ranks = f" with --tensor-parallel-size {request.ranks}" if request.ranks > 1 else ""
    return (
        f"Measured by `sagellm bench hardware`{ranks} on {day}; efficiencies are fitted to kernels in {request.dtype}."
    )


def _reporting_errors(run: Callable[[], Any]) -> int:
    """Exit code 0, or 1 with the message of the error on stderr."""
    try:
        run()
    except (SageError, EngineError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
