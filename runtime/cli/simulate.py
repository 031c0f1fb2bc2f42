"""`sagellm simulate`: replays a trace in the scheduler's modes and compares the service of the requests."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.loader.config_file import layout_of, read_config_file
from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import StepCostModel
from sageLLM.runtime.sim.distserve import read_profile
from sageLLM.runtime.sim.layer_profile import LayerProfileCost
from sageLLM.runtime.sim.metrics import Slo, Summary
from sageLLM.runtime.sim.modes import Setup, SimMode, make_cluster
from sageLLM.runtime.sim.report import as_data, as_table
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import Lengths, TraceRequest, at_rate, read_trace, synthetic

MAX_SEQ_LEN = 2**20


@dataclass(frozen=True, slots=True)
class SimulateRequest:
    """The arguments of `sagellm simulate`; empty `modes` means all.

    Without a `trace` one is generated: `num_requests` requests with prompt and answer lengths of these medians and
    90th percentiles.
    """

    trace: Path | None
    modes: Sequence[str]
    model: str
    hardware: str
    tensor_parallel_size: int
    profile: Path | None
    rate: float | None
    num_requests: int | None
    prompt: tuple[float, float]
    output: tuple[float, float]
    seed: int
    slo: Slo
    num_prefill: int
    num_decode: int
    chunk_size: int
    max_prefill_tokens: int
    max_batch_size: int
    block_size: int
    num_blocks: int | None
    as_json: bool


def run_simulation(request: SimulateRequest) -> int:
    """Prints a table, or JSON, to stdout; an error goes to stderr, with exit code 1."""
    try:
        modes = _modes(request)
        trace = _trace(request)
        shares_prefixes = any(one.block_hashes for one in trace)
        objective = ServiceObjective(request.slo.ttft_s, request.slo.tpot_s)
        setup = replace(_setup(request), enable_prefix_caching=shares_prefixes, objective=objective)
        results: dict[str, Summary] = {}
        for mode in modes:
            results[mode] = _simulated(mode, setup, trace, request)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_data(results, request.slo)) if request.as_json else as_table(results, request.slo))
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
    return [mode for mode in known if mode in request.modes or not request.modes]


def _simulated(mode: SimMode, setup: Setup, trace: Sequence[TraceRequest], request: SimulateRequest) -> Summary:
    started = time.perf_counter()
    simulation = Simulation(make_cluster(mode, setup))
    timelines = simulation.run(trace)
    seconds = time.perf_counter() - started
    print(f"{mode}: {simulation.num_steps} steps simulated in {seconds:.1f} s", file=sys.stderr)
    for number, reason in list(simulation.refusals.items())[:1]:
        print(f"{mode}: request {number} and {len(simulation.refusals) - 1} more rejected: {reason}", file=sys.stderr)
    return Summary.of(timelines, request.slo, simulation.num_steps)


def _trace(request: SimulateRequest) -> list[TraceRequest]:
    """The first requests of the trace, at their original times or at the requested rate."""
    if request.trace is None:
        if request.rate is None or request.num_requests is None:
            raise ValueError("pass --trace, or --rate and --num-requests to generate one")
        prompt, output = Lengths(*request.prompt, MAX_SEQ_LEN), Lengths(*request.output, MAX_SEQ_LEN)
        return synthetic(request.num_requests, request.rate, prompt, output, request.seed)
    trace = read_trace(request.trace)[: request.num_requests]
    if request.rate is not None:
        return at_rate(trace, request.rate, request.seed)
    if len(trace) > 1 and trace[-1].arrival_s == 0:
        raise ValueError(f"expected arrival times in {request.trace}; pass --rate")
    return trace


def _setup(request: SimulateRequest) -> Setup:
    scheduler = PDSchedulerConfig(
        max_prefill_batch_size=request.max_batch_size,
        max_prefill_tokens=request.max_prefill_tokens,
        prefill_chunk_size=request.chunk_size,
        max_decode_batch_size=request.max_batch_size,
    )
    if request.profile is not None:
        budget = None if request.num_blocks is None else KVBudget(request.num_blocks, request.block_size)
        cost: StepCostModel = _measured(request.profile, request)
        transfer_s: Callable[[int], float] = _no_transfer
    else:
        roofline = _roofline(request)
        num_blocks = request.num_blocks or roofline.num_kv_blocks(request.block_size)
        if not num_blocks:
            gigabytes = roofline.weight_bytes / 1e9
            raise ValueError(
                f"{request.model}: {gigabytes:.1f} GB of weights do not fit {request.hardware}; raise --tp"
            )
        budget = KVBudget(num_blocks, request.block_size)
        cost, transfer_s = roofline, roofline.transfer_s
    return Setup(
        cost,
        transfer_s,
        budget,
        num_prefill=request.num_prefill,
        num_decode=request.num_decode,
        scheduler=scheduler,
    )


def _no_transfer(num_tokens: int) -> float:
    """The KV transfer time for measured profiles, which do not describe links: 0 seconds."""
    return 0.0


def _measured(profile: Path, request: SimulateRequest) -> StepCostModel:
    """The cost model of a profile: a folder of op latencies by layer, or a file of coefficients by model name."""
    if profile.is_dir():
        _, config = _layout_and_config(request.model)
        return LayerProfileCost(profile, config.L)
    return read_profile(profile, request.model, request.tensor_parallel_size)


def _roofline(request: SimulateRequest) -> RooflineStepCost:
    if request.hardware not in HARDWARE:
        raise ValueError(f"--hardware must be one of {', '.join(HARDWARE)}, got {request.hardware}")
    layout, config = _layout_and_config(request.model)
    device = HARDWARE[request.hardware]
    return RooflineStepCost(layout, config, device, tensor_parallel_size=request.tensor_parallel_size)


def _layout_and_config(model: str) -> tuple[ModelLayout, Any]:
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    data = read_config_file(path)
    layout = layout_of(data, path, MODELS)
    return layout, layout.read_config(HFConfig(data, str(path)))
