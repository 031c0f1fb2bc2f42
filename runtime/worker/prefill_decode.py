"""Starts the processes of prefill and decode workers that copy KV to each other."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.transport.rows import best_digest
from sageLLM.runtime.transport.shards import memory_bytes
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.kv_group import KVGroup, MemberSpec, TransportName
from sageLLM.runtime.worker.process_executor import Listener, ProcessExecutor

KEY_BYTES = 32


class RoleSpec(NamedTuple):
    """A worker to start: its role, its tensor-parallel ranks, and its KV cache."""

    role: Role
    tp: int
    budget: KVBudget


def make_group(model: Model, workers: Sequence[RoleSpec], transport: TransportName) -> KVGroup:
    """The group of these workers, with memory for their pools. `model` has the config of one rank, without tp."""
    config = model.config
    shape = model.kv_entry
    widths = shape.k[1], None if shape.is_shared else shape.v[1]
    if not shape.is_shared and shape.k[0] != shape.v[0]:
        raise SageError("prefill and decode workers require as many key heads as value heads in the KV cache")
    members = [MemberSpec(one.tp, one.budget.num_blocks, one.budget.block_size) for one in workers]
    key = secrets.token_bytes(KEY_BYTES)
    group = KVGroup(0, 0, transport, key, config.L, shape.k[0], widths, members, best_digest())
    if transport != "shared_memory":
        return group
    with_memory = [
        msgspec.structs.replace(member, memory=[_memory(group, model, number, rank) for rank in range(member.tp)])
        for number, member in enumerate(members)
    ]
    return msgspec.structs.replace(group, members=with_memory)


def _memory(group: KVGroup, model: Model, worker: int, rank: int) -> int:
    """The descriptor of memory for the pool of a rank; it has no name, and pages exist only once they are used."""
    file = os.memfd_create(f"sagellm-kv-{worker}-{rank}", 0)
    os.ftruncate(file, memory_bytes(group.shape(worker, rank), model.kv_dtype))
    return file


def start_group(
    spec: WorkerSpec, workers: Sequence[RoleSpec], group: KVGroup, make_listener: Callable[[int], Listener]
) -> list[ProcessExecutor]:
    """An executor for each worker. They load at the same time. Raises what `ProcessExecutor` raises."""
    num_workers = sum(worker.tp for worker in workers)
    cores = divided_cores(num_workers)
    first_rank = [sum(worker.tp for worker in workers[:number]) for number in range(len(workers))]

    def start(number: int) -> ProcessExecutor:
        worker = workers[number]
        own = msgspec.structs.replace(
            spec,
            tp=worker.tp,
            budget=worker.budget,
            is_split=False,
            num_workers=num_workers,
            core_sets=cores[first_rank[number] : first_rank[number] + worker.tp],
            group=msgspec.structs.replace(group, worker=number),
        )
        return ProcessExecutor(own, listener=make_listener(number))

    with ThreadPoolExecutor(len(workers)) as starters:
        starting = [starters.submit(start, number) for number in range(len(workers))]
    try:
        return [one.result() for one in starting]
    except BaseException:
        for one in starting:
            if one.exception() is None:
                one.result().close()
        close_memory(group)
        raise


def close_memory(group: KVGroup) -> None:
    """Closes the descriptors of the pools in this process; the memory is gone with the last worker."""
    for file in group.files:
        os.close(file)


def divided_cores(num_ranks: int) -> list[list[int]]:
    """As many cores for each rank as it has threads, so that no rank delays another one; none if there are too few.

    With OMP_NUM_THREADS the user has chosen the threads, and the system places them.
    """
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // num_ranks
    return [cores[rank * share : (rank + 1) * share] for rank in range(num_ranks)] if share else []
