"""Checks the arguments of `LLM` that no other part of the engine checks."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.execution_graph.rewriting import ALL
from sageLLM.runtime.registry.plugins import Registry
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.worker.build import WeightsPlacement, WeightsTier
from sageLLM.runtime.worker.node import Node

MAX_AF_WORKERS = 64
"""Workers of a role, as the links of a process have numbers up to that."""
Backend: TypeAlias = Literal["uni", "mp"]
"""Workers in the process of the engine, or in separate processes; the names are vLLM's."""

DEFAULT_ADDRESS, DEFAULT_PORT = "127.0.0.1", 29501
MAX_PORT = 65535


def parse_device(name: str) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1". SageError if PyTorch does not know or find it."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise SageError(f"device must be cpu, or cuda on a machine with a GPU, got {shown(name)}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SageError(f"device is {shown(name)}, but PyTorch finds no GPU; use cpu")
    return device


def check_count(name: str, value: int) -> None:
    """Raises SageError unless the value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SageError(f"{name} must be an integer of at least 1, got {shown(value)}")


def choose_backend(requested: str | None, num_ranks: int) -> Backend:
    """The backend that runs the workers; by default the process of the engine for one rank. SageError if unknown."""
    if requested not in (None, "uni", "mp"):
        raise SageError(f"distributed_executor_backend must be 'uni', 'mp' or None, got {shown(requested)}")
    if num_ranks == 1:
        return "mp" if requested == "mp" else "uni"
    if requested == "uni":
        raise SageError(f"distributed_executor_backend must be 'mp' for {num_ranks} ranks, got 'uni'")
    return "mp"


def weights_placement(tier: str, budget: float | None, folder: str | Path | None) -> WeightsPlacement:
    """The placement of the weights for the options of `LLM`; `budget` is in GiB. SageError for an invalid one."""
    if tier not in ("device", "mapped", "disk"):
        raise SageError(f"weights_tier must be 'device', 'mapped' or 'disk', got {shown(tier)}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float)):
        raise SageError(f"weights_budget must be a number of GiB, got {shown(budget)}")
    if budget is not None and not 0 < budget < math.inf:
        raise SageError(f"weights_budget must be more than 0 GiB, got {budget}")
    if tier == "device":
        return WeightsPlacement()
    num_bytes = None if budget is None else int(budget * 2**30)
    kind: WeightsTier = "mapped" if tier == "mapped" else "disk"
    return WeightsPlacement(kind, num_bytes, None if folder is None else str(folder))


def parse_af(text: str | None) -> tuple[int, int, int] | None:
    """The numbers of attention workers, of groups of FFN workers, and of workers in each, in "2:1" or "2:1x2".

    SageError for any other text.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text) if isinstance(text, str) else None
    counts = (int(match[1]), int(match[2]), int(match[3] or 1)) if match else (0, 0, 0)
    if not 0 < max(counts[0], counts[1] * counts[2]) <= MAX_AF_WORKERS:
        raise SageError(
            f"af must be the numbers of attention and FFN workers, such as '2:1', each at most {MAX_AF_WORKERS}, "
            f"or '2:1x2' for feed-forwards that 2 workers divide, got {shown(text)}"
        )
    return counts


def choose_node(
    nnodes: int | None, node_rank: int | None, master_addr: str | None, master_port: int | None, num_ranks: int
) -> Node | None:
    """The host of this process, None for an engine on one host. SageError for an invalid argument.

    Without `nnodes` the variables of torchrun are used, if it has started `num_ranks` processes: each is a host with
    one rank.
    """
    environment: Mapping[str, str] = {}
    if nnodes is None and num_ranks > 1 and os.environ.get("WORLD_SIZE") == str(num_ranks):
        environment = os.environ
        nnodes = num_ranks
    node_rank = _variable(environment, "RANK", 0) if node_rank is None else node_rank
    master_addr = master_addr or environment.get("MASTER_ADDR") or DEFAULT_ADDRESS
    if master_port is None:
        # torchrun itself listens on its port, for its store.
        own = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        master_port = _variable(environment, "MASTER_PORT", DEFAULT_PORT) + own
    nnodes = 1 if nnodes is None else nnodes
    check_count("nnodes", nnodes)
    check_count("master_port", master_port)
    if master_port > MAX_PORT:
        raise SageError(f"master_port must be an integer from 1 to {MAX_PORT}, got {master_port}")
    if isinstance(node_rank, bool) or not isinstance(node_rank, int) or not 0 <= node_rank < nnodes:
        raise SageError(f"node_rank must be an integer from 0 to nnodes - 1 = {nnodes - 1}, got {shown(node_rank)}")
    if num_ranks % nnodes:
        raise SageError(f"nnodes={nnodes} must divide tensor_parallel_size * pipeline_parallel_size = {num_ranks}")
    return Node(nnodes, node_rank, master_addr, master_port) if nnodes > 1 else None


def _variable(environment: Mapping[str, str], name: str, default: int) -> int:
    """The number in a variable of torchrun."""
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise SageError(
            f"the variable {name} of torchrun must be a number, got {shown(text)}; unset WORLD_SIZE to ignore it"
        )
    return int(text)


def check_passes(names: Sequence[str], registry: Registry) -> None:
    """Raises SageError for a name that is not a pass of the registry."""
    known = [*registry.passes, ALL]
    if unknown := [name for name in names if name not in known]:
        raise SageError(f"disable_passes must name passes of {', '.join(known)}, got {', '.join(map(shown, unknown))}")


def with_kv_options(config: PDSchedulerConfig, budget: KVBudget, enable_prefix_caching: bool) -> PDSchedulerConfig:
    """The scheduler config with the KV options of `LLM`; where a tier exists, preempted requests are swapped."""
    has_tier = bool(budget.num_host_blocks or budget.num_disk_blocks)
    if config.preemption_mode == "swap" and not has_tier:
        raise SageError("preemption_mode 'swap' requires a tier to swap to; set swap_space or disk_space")
    return replace(
        config,
        enable_prefix_caching=config.enable_prefix_caching and enable_prefix_caching,
        preemption_mode="swap" if has_tier else "recompute",
    )
