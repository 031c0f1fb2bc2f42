"""Degrees of parallelism of an engine, from the options of `LLM`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.engine.arguments import Backend, check_count, choose_backend, choose_node, parse_af
from sageLLM.runtime.engine.options import LLMOptions
from sageLLM.runtime.errors import SageError
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

    @property
    def role_degrees(self) -> list[tuple[str, int]]:
        """The options that set degrees of workers of one role, as text, and these degrees."""
        if self.af is not None:
            return [(f"af='A:Fx{self.af.width}'", self.af.width)]
        if self.pd is None:
            return []
        degrees = {"prefill": self.pd.prefill_tp, "decode": self.pd.decode_tp}
        return [(f"{role}_tensor_parallel_size={degree}", degree) for role, degree in degrees.items()]

    def num_pools(self, is_strict: bool) -> int:
        """The KV pools that share the memory for KV."""
        if self.pd is not None:
            return self.pd.prefill + self.pd.decode
        return self.num_engines * (2 if is_strict else 1)


def choose_parallelism(options: LLMOptions) -> Parallelism:
    """The parallelism of the options of `LLM`, whose combinations are checked. SageError for an invalid one."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "num_ubatches"):
        check_count(name, getattr(options, name))
    counts = parse_af(options.af)
    pd = choose_pd(options)
    num_ranks = options.tensor_parallel_size * options.pipeline_parallel_size
    num_processes = counts[0] + counts[1] * counts[2] if counts else num_ranks
    if pd is not None:
        num_processes = pd.prefill * pd.prefill_tp + pd.decode * pd.decode_tp
    node = choose_node(options.nnodes, options.node_rank, options.master_addr, options.master_port, num_ranks)
    return Parallelism(
        tp=options.tensor_parallel_size,
        pp=options.pipeline_parallel_size,
        af=None if counts is None else AfCounts(*counts),
        pd=pd,
        backend=choose_backend(options.distributed_executor_backend, num_processes),
        node=node,
    )


def choose_pd(options: LLMOptions) -> PdWorkers | None:
    """The prefill and decode workers, None without. Raises SageError for an invalid argument."""
    for name, kind in (("kv_transport", TransportName), ("kv_load_failure_policy", LoadFailurePolicy)):
        if (value := getattr(options, name)) not in get_args(kind):
            raise SageError(f"{name} must be one of {', '.join(get_args(kind))}; got {shown(value)}")
    if options.prefill_workers is None or options.decode_workers is None:
        return None
    tp = options.tensor_parallel_size
    workers = PdWorkers(
        options.prefill_workers,
        options.decode_workers,
        options.prefill_tensor_parallel_size or tp,
        options.decode_tensor_parallel_size or tp,
        options.kv_transport,
        options.kv_load_failure_policy,
        options.decode_block_size,
    )
    check_count("prefill_workers", workers.prefill)
    check_count("decode_workers", workers.decode)
    check_count("prefill_tensor_parallel_size", workers.prefill_tp)
    check_count("decode_tensor_parallel_size", workers.decode_tp)
    if workers.decode_block_size is not None:
        check_count("decode_block_size", workers.decode_block_size)
    return workers
