"""`sagellm simulate`: replays a trace in the scheduler's modes and compares the service of the requests."""

import json
import sys
import time
from collections.abc import Sequence
from typing import get_args

from sageLLM.runtime.cli.simulate_deploy import of_deployment
from sageLLM.runtime.cli.simulate_request import SimulateRequest
from sageLLM.runtime.cli.simulate_setup import make_setup
from sageLLM.runtime.cli.trace_options import requested_trace
from sageLLM.runtime.sim.measured import read_measured
from sageLLM.runtime.sim.metrics import Summary
from sageLLM.runtime.sim.modes import Setup, SimMode, make_cluster
from sageLLM.runtime.sim.report import as_data, as_table
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import BadRowError, TraceRequest


def run_simulation(request: SimulateRequest) -> int:
    """Prints a table, or JSON, to stdout; an error goes to stderr, with exit code 1."""
    try:
        if request.deploy is not None:
            request = of_deployment(request, request.deploy)
        modes = _modes(request)
        measured = _measured(request)
        trace = requested_trace(request)
        results: dict[str, Summary] = {}
        for label, mode, chunk_size in _rows(modes, request.chunk_sizes):
            results[label] = _simulated(label, mode, make_setup(request, chunk_size), trace, request)
    except BadRowError as error:
        print(f"error: {error}; pass --skip-bad-rows to skip and count such rows", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if request.as_json:
        print(json.dumps(as_data(results, request.slo, measured)))
    else:
        print(as_table(results, request.slo, measured))
    return 0


def _modes(request: SimulateRequest) -> list[SimMode]:
    """The requested modes, or all modes that the numbers of workers allow."""
    known: tuple[SimMode, ...] = get_args(SimMode)
    for name in request.modes:
        if name not in known:
            raise ValueError(f"--mode must be one of {', '.join(known)}, got {name}")
    if not request.num_decode:
        if "strict" in request.modes:
            raise ValueError("strict mode requires at least one decode worker, got --decode-workers 0")
        known = known[1:]  # without strict, the first mode
    if request.expert_parallel_size > 1 and not request.modes:
        known = tuple(mode for mode in known if mode != "strict")
    return [mode for mode in known if mode in request.modes or not request.modes]


def _rows(modes: Sequence[SimMode], chunk_sizes: Sequence[int]) -> list[tuple[str, SimMode, int]]:
    """The label, mode and chunk size of each row: hybrid mode has one for each chunk size."""
    rows: list[tuple[str, SimMode, int]] = []
    for mode in modes:
        if mode == "hybrid" and len(chunk_sizes) > 1:
            rows += [(f"hybrid/{size}", mode, size) for size in chunk_sizes]
        else:
            rows.append((mode, mode, chunk_sizes[0]))
    return rows


def _measured(request: SimulateRequest) -> Summary | None:
    """The service that the trace records, if a comparison is requested."""
    if not request.compares:
        return None
    if request.trace is None or request.rate is not None or request.num_requests is not None or request.skips_bad_rows:
        raise ValueError(
            "--compare requires --trace with all its requests at their own times: "
            "omit --rate, --num-requests and --skip-bad-rows"
        )
    return Summary.of(read_measured(request.trace), request.slo, 0)


def _simulated(
    label: str, mode: SimMode, setup: Setup, trace: Sequence[TraceRequest], request: SimulateRequest
) -> Summary:
    started = time.perf_counter()
    simulation = Simulation(make_cluster(mode, setup))
    timelines = simulation.run(trace)
    seconds = time.perf_counter() - started
    print(f"{label}: {simulation.num_steps} steps simulated in {seconds:.1f} s", file=sys.stderr)
    for number, reason in list(simulation.refusals.items())[:1]:
        print(f"{label}: request {number} and {len(simulation.refusals) - 1} more rejected: {reason}", file=sys.stderr)
    return Summary.of(timelines, request.slo, simulation.num_steps)
