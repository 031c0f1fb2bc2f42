"""`sagellm simulate`: plays a trace through the scheduler's modes and compares what the requests get."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
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
    """The command's arguments; no `modes` are all.

    Without `trace` one is drawn: `num_requests`, of prompts and answers with these medians and 90th percentiles.
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
    """Prints a table, or JSON, to stdout; a refusal goes to stderr, with exit code 1."""
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
    """Those asked for, or all that the workers allow."""
    known: tuple[SimMode, ...] = get_args(SimMode)
    for name in request.modes:
        if name not in known:
            raise ValueError(f"no mode named {name}; known are {', '.join(known)}")
    if not request.num_decode:
        if "strict" in request.modes:
            raise ValueError("strict mode needs at least one of --decode-workers")
        known = known[1:]
    return [mode for mode in known if mode in request.modes or not request.modes]


def _simulated(mode: SimMode, setup: Setup, trace: Sequence[TraceRequest], request: SimulateRequest) -> Summary:
    started = time.perf_counter()
    simulation = Simulation(make_cluster(mode, setup))
    timelines = simulation.run(trace)
    seconds = time.perf_counter() - started
    print(f"{mode}: {simulation.num_steps} steps simulated in {seconds:.1f} s", file=sys.stderr)
    for number, reason in list(simulation.refusals.items())[:1]:
        print(f"{mode}: request {number} and {len(simulation.refusals) - 1} more refused: {reason}", file=sys.stderr)
    return Summary.of(timelines, request.slo, simulation.num_steps)


def _trace(request: SimulateRequest) -> list[TraceRequest]:
    """The trace's first requests, at its own times or at the rate asked for."""
    if request.trace is None:
        if request.rate is None or request.num_requests is None:
            raise ValueError("without --trace, give --rate and --num-requests to draw one")
        prompt, output = Lengths(*request.prompt, MAX_SEQ_LEN), Lengths(*request.output, MAX_SEQ_LEN)
        return synthetic(request.num_requests, request.rate, prompt, output, request.seed)
    trace = read_trace(request.trace)[: request.num_requests]
    if request.rate is not None:
        return at_rate(trace, request.rate, request.seed)
    if len(trace) > 1 and trace[-1].arrival_s == 0:
        raise ValueError(f"{request.trace} has no arrival times: give --rate")
    return trace


def _setup(request: SimulateRequest) -> Setup:
    workers = request.num_prefill, request.num_decode
    scheduler = PDSchedulerConfig(
        max_prefill_batch_size=request.max_batch_size,
        max_prefill_tokens=request.max_prefill_tokens,
        prefill_chunk_size=request.chunk_size,
        max_decode_batch_size=request.max_batch_size,
    )
    if request.profile is not None:
        budget = None if request.num_blocks is None else KVBudget(request.num_blocks, request.block_size)
        return Setup(_measured(request.profile, request), _at_once, budget, *workers, scheduler)
    roofline = _roofline(request)
    num_blocks = request.num_blocks or roofline.num_kv_blocks(request.block_size)
    if not num_blocks:
        gigabytes = roofline.weight_bytes / 1e9
        raise ValueError(f"{request.model}: {gigabytes:.1f} GB of weights do not fit {request.hardware}; raise --tp")
    budget = KVBudget(num_blocks, request.block_size)
    return Setup(roofline, roofline.transfer_s, budget, *workers, scheduler)


def _at_once(num_tokens: int) -> float:
    """The transfer time of KV where nothing is known of links."""
    return 0.0


def _measured(profile: Path, request: SimulateRequest) -> StepCostModel:
    """A folder holds op latencies by layer, a file fitted coefficients by model name."""
    if profile.is_dir():
        _, config = _layout_and_config(request.model)
        return LayerProfileCost(profile, config.L)
    return read_profile(profile, request.model, request.tensor_parallel_size)


def _roofline(request: SimulateRequest) -> RooflineStepCost:
    if request.hardware not in HARDWARE:
        raise ValueError(f"no hardware named {request.hardware}; known are {', '.join(HARDWARE)}")
    layout, config = _layout_and_config(request.model)
    device = HARDWARE[request.hardware]
    return RooflineStepCost(layout, config, device, tensor_parallel_size=request.tensor_parallel_size)


def _layout_and_config(model: str) -> tuple[ModelLayout, Any]:
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{model} is neither a config.json nor a folder with one")
    data = json.loads(path.read_bytes())
    architecture = str((data.get("architectures") or [""])[0])
    layout = next((one for one in MODELS.values() if architecture in one.architectures), None)
    if layout is None:
        raise ValueError(f"{path}: no layout reads {data.get('architectures')}")
    return layout, layout.read_config(HFConfig(data, str(path)))
