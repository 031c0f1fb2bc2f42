"""Simulation of a deploy spec: its workers, limits and objective in place of the options of `sagellm simulate`."""

from collections.abc import Mapping
from dataclasses import replace

from sageLLM.runtime.cli.deploy_file import find_placement
from sageLLM.runtime.cli.simulate_request import DEFAULT_MODEL, SimulateRequest
from sageLLM.runtime.deploy.placement import Placement


def of_deployment(request: SimulateRequest, name: str) -> SimulateRequest:
    """The request with the values of a deployment. Raises ValueError for one that is not simulated.

    The model is the deployment's unless --model names another one, since the checkpoint may be on other hosts only.
    """
    placement, _ = find_placement(name)
    changed = _workers(placement) | _limits(placement)
    if request.model == DEFAULT_MODEL:
        changed["model"] = placement.model
    if not request.modes:
        changed["modes"] = [placement.mode or ("strict" if placement.is_disaggregated else "hybrid")]
    hardware = request.hardware or placement.hardware
    changed |= {"slo_ttft": placement.ttft_s, "slo_tpot": placement.tpot_s}
    return replace(request, hardware=hardware, **changed)  # type: ignore[arg-type]


def _workers(placement: Placement) -> dict[str, object]:
    roles = placement.roles
    if "both" in roles:
        role = roles["both"]
        # All but strict mode have as many workers as there are of both roles.
        degrees = {"tensor_parallel_size": role.tp, "pipeline_depth": role.pp}
        return {"num_prefill": role.count, "num_decode": 0, **degrees}
    if "attention" in roles:
        raise ValueError(f"{placement.name}: attention and FFN workers are not simulated; write the role `both`")
    prefill, decode = roles["prefill"], roles["decode"]
    if prefill.pp != decode.pp:
        raise ValueError(
            f"{placement.name}: the simulator requires an equal `pp` of both roles, got {prefill.pp} and {decode.pp}"
        )
    tp = {"tensor_parallel_size": decode.tp, "prefill_tp": prefill.tp, "decode_tp": decode.tp}
    return {**tp, "num_prefill": prefill.count, "num_decode": decode.count, "pipeline_depth": prefill.pp}


def _limits(placement: Placement) -> dict[str, object]:
    """The limits by the names of the request; where roles differ, those of the one with the larger value."""
    found: dict[str, int] = {}
    for role in placement.roles.values():
        for name, value in placement.limits_of(role).items():
            found[name] = max(value, found.get(name, 0))
    names: Mapping[str, str] = {
        "max_model_len": "max_model_len",
        "max_num_seqs": "max_batch_size",
        "max_num_batched_tokens": "max_prefill_tokens",
        "num_kv_blocks": "num_blocks",
        "block_size": "block_size",
    }
    changed: dict[str, object] = {names[name]: value for name, value in found.items() if name in names}
    if "prefill_chunk_size" in found:
        changed["chunk_sizes"] = [found["prefill_chunk_size"]]
    return changed
