"""Cost models, KV budgets and workers of `sagellm simulate` from its arguments."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.cli.hardware_entry import find_hardware
from sageLLM.runtime.cli.simulate_request import SimulateRequest
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.execution_graph.stage_sizes import choose_sizes, vllm_sizes
from sageLLM.runtime.execution_graph.step_cost import DivideLayers, RooflineStepCost
from sageLLM.runtime.loader.config_file import layout_of, read_config_file
from sageLLM.runtime.loader.kv_form import choose_kv_form
from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import StepCostModel, StepWork
from sageLLM.runtime.sim.distserve import read_profile
from sageLLM.runtime.sim.layer_profile import LayerProfileCost, ProfiledModel, tables_of
from sageLLM.runtime.sim.modes import RoleSetup, Setup
from sageLLM.runtime.sim.overheads import AddedCost, HostTime
from sageLLM.runtime.sim.pipeline import WHOLE


@dataclass(frozen=True, slots=True)
class _Device:
    """The devices of a worker of one tensor-parallel degree; `vllm` if vLLM divides the layers differently."""

    cost: StepCostModel
    kv_budget: KVBudget | None
    transfer_s: Callable[[int], float]
    stage_shares: tuple[float, ...] = WHOLE
    vllm: RoleSetup | None = None


def make_setup(request: SimulateRequest, chunk_size: int) -> Setup:
    """The setup of a simulation. Raises ValueError for arguments that contradict each other, or a bad profile."""
    num_workers = _num_workers(request)
    tp = request.tensor_parallel_size
    devices = {degree: _device(request, degree) for degree in {tp, request.prefill_tp or tp, request.decode_tp or tp}}
    device, prefill, decode = devices[tp], devices[request.prefill_tp or tp], devices[request.decode_tp or tp]
    return Setup(
        device.cost,
        # KV moves between all devices of the two workers at once, so the worker with fewer devices decides.
        lambda num_tokens: max(prefill.transfer_s(num_tokens), decode.transfer_s(num_tokens)),
        device.kv_budget,
        num_prefill=request.num_prefill,
        num_decode=request.num_decode,
        num_workers=num_workers,
        scheduler=_scheduler(request, chunk_size),
        roles={
            "prefill": RoleSetup(prefill.cost, prefill.kv_budget),
            "decode": RoleSetup(decode.cost, decode.kv_budget),
        },
        stage_shares=device.stage_shares,
        expert_parallel_size=request.expert_parallel_size,
        enable_prefix_caching=request.prefix_caching,
        max_model_len=request.max_model_len,
        full_sequence_must_fit=request.full_sequence_gate,
        long_prefill_token_threshold=request.long_prefill_threshold,
        async_scheduling=request.async_scheduling,
        objective=request.objective,
        vllm=device.vllm,
    )


def _num_workers(request: SimulateRequest) -> int:
    """The workers of the modes besides strict, on as many devices."""
    tp = request.tensor_parallel_size
    prefill_devices = request.num_prefill * (request.prefill_tp or tp)
    num_devices = prefill_devices + request.num_decode * (request.decode_tp or tp)
    if num_devices % tp and set(request.modes) != {"strict"}:
        raise ValueError(
            f"--tp {tp} must divide the {num_devices} devices of strict mode, as the other modes have as many; "
            "pass another --tp, or --mode strict"
        )
    num_workers, ep = num_devices // tp, request.expert_parallel_size
    if ep > 1 and ("strict" in request.modes or request.pipeline_depth > 1):
        raise ValueError(f"--ep {ep} requires --pp 1 and modes other than strict")
    if num_workers % ep:
        raise ValueError(f"--ep {ep} must divide the {num_workers} workers")
    return num_workers


def _scheduler(request: SimulateRequest, chunk_size: int) -> PDSchedulerConfig:
    return PDSchedulerConfig(
        max_prefill_batch_size=request.max_batch_size,
        max_prefill_tokens=request.max_prefill_tokens,
        prefill_chunk_size=chunk_size,
        max_decode_batch_size=request.max_batch_size,
        max_decode_tokens=request.max_batch_size,  # each decode is one token
        max_consecutive_decodes=request.max_consecutive_decodes,
        max_decode_context_tokens=request.max_decode_context,
    )


def _device(request: SimulateRequest, tp: int) -> _Device:
    """Cost and KV of a worker of `tp` devices per stage."""
    if request.profile is not None and request.profile.is_file():
        return _from_coefficients(request, request.profile, tp)
    roofline = _roofline(request, tp)
    if request.profile is None:
        cost: StepCostModel = roofline
    else:
        _check_hardware(request, tp)
        cost = LayerProfileCost(
            tables_of(request.profile, tp), profiled_model(roofline), roofline.link_s, request.expert_parallel_size
        )
    extras = _host_times(request)
    if request.expert_parallel_size > 1:
        extras.append(roofline.exchange_s)
    if request.pipeline_depth > 1:
        num_hops = request.pipeline_depth - 1
        extras.append(lambda work: num_hops * roofline.stage_transfer_s(work.num_tokens))
    is_described = request.profile is None or request.hardware is not None
    cost = AddedCost(cost, extras) if extras else cost
    ours = _stages(request, roofline, cost, choose_sizes)
    vllm = _stages(request, roofline, cost, vllm_sizes) if "vllm" in request.modes else None
    transfer_s = roofline.transfer_s if is_described else _no_transfer
    return _Device(cost, ours.kv_budget, transfer_s, ours.stage_shares or WHOLE, vllm)


def _stages(
    request: SimulateRequest, roofline: RooflineStepCost, cost: StepCostModel, divide: DivideLayers
) -> RoleSetup:
    """Workers of which `divide` divides the layers among the stages."""
    budget = _kv_budget(request, roofline, divide)
    return RoleSetup(cost, budget, roofline.stage_shares(request.pipeline_depth, divide))


def _from_coefficients(request: SimulateRequest, profile: Path, tp: int) -> _Device:
    """DistServe's coefficients by model name, which include the collectives of their degree."""
    if request.pipeline_depth > 1 or request.expert_parallel_size > 1:
        raise ValueError(f"{profile}: --pp and --ep must be 1 with coefficients, which describe whole steps")
    budget = None if request.num_blocks is None else KVBudget(request.num_blocks, request.block_size)
    cost = AddedCost(read_profile(profile, request.model, tp), _host_times(request))
    return _Device(cost, budget, _no_transfer)


def _check_hardware(request: SimulateRequest, tp: int) -> None:
    """A profile describes one device; the links between several come from a hardware entry."""
    for option, degree in (("--tp", tp), ("--pp", request.pipeline_depth), ("--ep", request.expert_parallel_size)):
        if degree > 1 and request.hardware is None:
            raise ValueError(f"{option} {degree} with --profile requires --hardware, for the links between devices")


def _host_times(request: SimulateRequest) -> list[Callable[[StepWork], float]]:
    """The time of the scheduler, if the arguments set it."""
    host = HostTime(request.step_overhead_us / 1e6, request.request_overhead_us / 1e6)
    return [host] if host != HostTime() else []


def _no_transfer(num_tokens: int) -> float:
    """The KV transfer time of a profile without a hardware entry, which does not describe links: 0 seconds."""
    return 0.0


def _kv_budget(request: SimulateRequest, roofline: RooflineStepCost, divide: DivideLayers) -> KVBudget | None:
    """The KV that the arguments set, or all that fits the device; None (unbounded) for an unknown device."""
    if request.num_blocks is not None:
        return KVBudget(request.num_blocks, request.block_size)
    if request.profile is not None and request.hardware is None:
        return None
    depth = request.pipeline_depth
    num_blocks = roofline.num_kv_blocks(request.block_size, pipeline_depth=depth, divide=divide)
    if not num_blocks:
        raise ValueError(
            f"{request.model}: {roofline.weight_bytes / 1e9:.1f} GB of weights do not fit {roofline.hardware.name}; "
            "raise --tp"
        )
    return KVBudget(num_blocks, request.block_size)


def _roofline(request: SimulateRequest, tp: int) -> RooflineStepCost:
    layout, config = layout_and_config(request.model)
    hardware = find_hardware(request.hardware)
    roofline = RooflineStepCost(
        layout,
        config,
        hardware,
        tensor_parallel_size=tp,
        is_fused=request.is_fused,
        expert_parallel_size=request.expert_parallel_size,
        kv_form=choose_kv_form(request.kv_cache_dtype, layout, config),
    )
    if request.expert_parallel_size > 1 and not roofline.num_moe_layers:
        raise ValueError(f"{request.model}: --ep {request.expert_parallel_size} requires a model with experts")
    return roofline


def profiled_model(roofline: RooflineStepCost) -> ProfiledModel:
    """The facts of a model that select the tables of a profile, from its graph."""
    graph, config = roofline.graph, roofline.config
    return ProfiledModel(
        num_layers=config.L,
        num_moe_layers=roofline.num_moe_layers,
        num_experts=getattr(config, "X", 0),
        experts_per_token=getattr(config, "A", 0),
        has_rope=any("rope" in node.op for node in graph.nodes.values()),
        has_qk_norm=any(name.endswith("q_norm") for name in graph.weights),
    )


def layout_and_config(model: str) -> tuple[ModelLayout, Any]:
    """The layout and the config of a model, by its config.json or the folder that holds it."""
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    data = read_config_file(path)
    layout = layout_of(data, path, MODELS)
    return layout, layout.read_config(HFConfig(data, str(path)))
