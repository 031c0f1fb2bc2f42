"""Degrees of parallelism of an engine, and the checks of their combinations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sageLLM.runtime.engine.arguments import Backend, check_count, choose_backend, choose_node, parse_af
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.worker.node import Node


class AfCounts(NamedTuple):
    """Numbers of attention and of FFN workers."""

    attention: int
    ffn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """Ranks, stages, micro-batches and workers of an engine; `node` is this host, None for an engine on one host."""

    tp: int
    pp: int
    af: AfCounts | None
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


class _Conflict(NamedTuple):
    """Two options that exclude each other: one that is set, the other that must keep its default, and the message."""

    option: str
    other: str
    message: str


CONFLICTS = (
    _Conflict(
        "num_ubatches",
        "pipeline_parallel_size",
        "num_ubatches must be 1 with several pipeline stages, got {num_ubatches}",
    ),
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
    check_conflicts({**degrees, "af": af, **others})
    num_ranks = tensor_parallel_size * pipeline_parallel_size
    node = choose_node(nnodes, node_rank, master_addr, master_port, num_ranks)
    return Parallelism(
        tp=tensor_parallel_size,
        pp=pipeline_parallel_size,
        af=None if counts is None else AfCounts(*counts),
        backend=choose_backend(distributed_executor_backend, sum(counts) if counts else num_ranks),
        node=node,
    )


def check_conflicts(options: Mapping[str, Any]) -> None:
    """Raises SageError for the first of `CONFLICTS` whose options are both set."""
    for conflict in CONFLICTS:
        if options[conflict.option] not in _DEFAULTS and options[conflict.other] not in _DEFAULTS:
            raise SageError(conflict.message.format_map(options))
