"""Degrees of parallelism of an engine, and the checks of their combinations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, get_args

import torch

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.engine.arguments import Backend, check_count, choose_backend, choose_node, parse_af
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.scheduler.group_transfers import LoadFailurePolicy
from sageLLM.runtime.worker.kv_group import TransportName
from sageLLM.runtime.worker.node import Node


class AfCounts(NamedTuple):
    """Numbers of attention workers, and of groups of FFN workers; `width` workers of a group divide a feed-forward."""

    attention: int
    ffn: int
    width: int = 1


class PdWorkers(NamedTuple):
    """Prefill and decode workers in processes: their numbers, their ranks, and how KV travels between them."""

    prefill: int
    decode: int
    prefill_tp: int
    decode_tp: int
    transport: TransportName
    policy: LoadFailurePolicy
    decode_block_size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """Ranks, stages, micro-batches and workers of an engine; `node` is this host, None for an engine on one host."""

    tp: int
    pp: int
    af: AfCounts | None
    pd: PdWorkers | None
    backend: Backend
    node: Node | None

    @property
    def num_ranks(self) -> int:
        """Ranks of the model; attention and FFN workers are not ranks."""
        return self.tp * self.pp

    @property
    def num_engines(self) -> int:
        """Engines that requests are divided among, each with a scheduler and a KV cache."""
        return 1 if self.af is None else self.af.attention

    def num_pools(self, is_strict: bool) -> int:
        """The KV pools that share the memory for KV."""
        if self.pd is not None:
            return self.pd.prefill + self.pd.decode
        return self.num_engines * (2 if is_strict else 1)


class _Conflict(NamedTuple):
    """Two options that exclude each other: one that is set, the other that must keep its default, and the message."""

    option: str
    other: str
    message: str


CONFLICTS = (
    _Conflict(
        "af",
        "tensor_parallel_size",
        "af must not be combined with tensor_parallel_size or pipeline_parallel_size; use one",
    ),
    _Conflict(
        "af",
        "pipeline_parallel_size",
        "af must not be combined with tensor_parallel_size or pipeline_parallel_size; use one",
    ),
    _Conflict("af", "weights_tier", "af must not be combined with weights_tier={weights_tier!r}; use one of them"),
    _Conflict("af", "kv_tier", "af must not be combined with kv_tier={kv_tier!r}; use one of them"),
    _Conflict("prefill_workers", "af", "prefill_workers must not be combined with af; use one of them"),
    _Conflict(
        "prefill_workers", "kv_tier", "prefill_workers must not be combined with kv_tier={kv_tier!r}; use one of them"
    ),
    _Conflict(
        "prefill_workers",
        "pipeline_parallel_size",
        "prefill_workers must not be combined with pipeline_parallel_size={pipeline_parallel_size}; use "
        "tensor_parallel_size",
    ),
    _Conflict("prefill_workers", "nnodes", "prefill_workers must not be combined with nnodes={nnodes}: one host only"),
)
"""Combinations that the engine refuses. An option is set if its value is not one of `_DEFAULTS`."""

_DEFAULTS: tuple[Any, ...] = (None, 1, "device")


def choose_parallelism(
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    num_ubatches: int,
    af: str | None,
    distributed_executor_backend: str | None,
    nnodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    prefill_workers: int | None = None,
    decode_workers: int | None = None,
    prefill_tensor_parallel_size: int | None = None,
    decode_tensor_parallel_size: int | None = None,
    decode_block_size: int | None = None,
    kv_transport: TransportName = "shared_memory",
    kv_load_failure_policy: LoadFailurePolicy = "recompute",
    **others: Any,
) -> Parallelism:
    """The parallelism of the options of `LLM`; `others` are options that exclude some of them. SageError if invalid."""
    degrees = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "num_ubatches": num_ubatches,
    }
    for name, degree in degrees.items():
        check_count(name, degree)
    counts = parse_af(af)
    is_pd = None if prefill_workers is None else True
    check_conflicts({**degrees, "af": af, "prefill_workers": is_pd, "nnodes": nnodes, **others})
    pd = choose_pd(
        prefill_workers,
        decode_workers,
        prefill_tensor_parallel_size or tensor_parallel_size,
        decode_tensor_parallel_size or tensor_parallel_size,
        kv_transport,
        kv_load_failure_policy,
        decode_block_size,
    )
    num_ranks = tensor_parallel_size * pipeline_parallel_size
    num_processes = counts[0] + counts[1] * counts[2] if counts else num_ranks
    if pd is not None:
        num_processes = pd.prefill * pd.prefill_tp + pd.decode * pd.decode_tp
    node = choose_node(nnodes, node_rank, master_addr, master_port, num_ranks)
    return Parallelism(
        tp=tensor_parallel_size,
        pp=pipeline_parallel_size,
        af=None if counts is None else AfCounts(*counts),
        pd=pd,
        backend=choose_backend(distributed_executor_backend, num_processes),
        node=node,
    )


def choose_pd(
    prefill: int | None,
    decode: int | None,
    prefill_tp: int,
    decode_tp: int,
    transport: str,
    policy: str,
    decode_block_size: int | None,
) -> PdWorkers | None:
    """The prefill and decode workers, None without. Raises SageError for an invalid argument."""
    choices = (("kv_transport", transport, TransportName), ("kv_load_failure_policy", policy, LoadFailurePolicy))
    for name, value, kind in choices:
        if value not in get_args(kind):
            raise SageError(f"{name} must be one of {', '.join(get_args(kind))}; got {shown(value)}")
    if prefill is None and decode is None:
        return None
    if prefill is None or decode is None:
        raise SageError("prefill_workers and decode_workers must be set together")
    numbers = {
        "prefill_workers": prefill,
        "decode_workers": decode,
        "prefill_tensor_parallel_size": prefill_tp,
        "decode_tensor_parallel_size": decode_tp,
    }
    if decode_block_size is not None:
        numbers["decode_block_size"] = decode_block_size
    for name, number in numbers.items():
        check_count(name, number)
    return PdWorkers(
        prefill,
        decode,
        prefill_tp,
        decode_tp,
        cast(TransportName, transport),
        cast(LoadFailurePolicy, policy),
        decode_block_size,
    )


def check_pd(parallelism: Parallelism, config: PDSchedulerConfig, device: torch.device) -> None:
    """Raises SageError for prefill and decode workers with another mode or device."""
    if parallelism.pd is None:
        return
    if config.mode != "strict":
        raise SageError(f"prefill_workers and decode_workers require mode 'strict' (--pd strict), got {config.mode!r}")
    if device.type != "cpu":
        raise SageError(f"prefill_workers and decode_workers require device 'cpu', got {device.type!r}")


def check_conflicts(options: Mapping[str, Any]) -> None:
    """Raises SageError for the first of `CONFLICTS` whose options are both set."""
    for conflict in CONFLICTS:
        if _is_set(options[conflict.option]) and _is_set(options[conflict.other]):
            raise SageError(conflict.message.format_map(options))


def _is_set(value: Any) -> bool:
    return value is True or value not in _DEFAULTS
