"""Starts the worker processes of one host."""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

import msgspec

from sageLLM.runtime.kernels.cpu.communicator import make_shared_memory
from sageLLM.runtime.kernels.cpu.point_to_point import make_link_memory
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.rank import Rank
from sageLLM.runtime.worker.worker_process import WORKERS, WorkerProcess

WORKER = "sageLLM.runtime.worker.process"


def start_ranks(spec: WorkerSpec, ranks: Sequence[int], interface: str | None) -> list[Rank]:
    """Starts ranks on the host of the engine."""
    pairs = {rank: socket.socketpair() for rank in ranks}
    try:
        processes = start_processes(spec, {rank: theirs.fileno() for rank, (_, theirs) in pairs.items()}, interface)
    finally:
        for _, theirs in pairs.values():
            theirs.close()
    return [Rank(rank, process, Connection(pairs[rank][0].detach())) for rank, process in processes.items()]


def start_rank(spec: WorkerSpec, module: str) -> Rank:
    """Starts a process that runs a module other than that of a rank."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = _start(spec, theirs.fileno(), "lo", module)
    return Rank(spec.rank, process, Connection(ours.detach()))


def start_processes(
    spec: WorkerSpec, connections: Mapping[int, int], interface: str | None
) -> dict[int, WorkerProcess]:
    """Starts the ranks with these descriptors of their connections to the engine.

    `interface` is the network interface of gloo; None lets gloo choose.
    """
    spec = msgspec.structs.replace(spec, host_ranks=list(connections))
    memory = _SharedMemory(spec)
    try:
        return {rank: _start(memory.spec_of(rank), file, interface, WORKER) for rank, file in connections.items()}
    finally:
        memory.close()


class _SharedMemory:
    """Memory for the collectives of each stage on this host, and for the links of its ranks, where it is used."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        is_used = uses_shared_memory(spec)
        local = set(spec.host_ranks)
        self._stages = {
            stage: make_shared_memory(spec.tp)
            for stage in range(spec.pp)
            if is_used and spec.tp > 1 and local.issuperset(spec.ranks_of_stage(stage))
        }
        self._links = make_link_memory(spec.num_ranks) if is_used and spec.pp > 1 else None

    def spec_of(self, rank: int) -> WorkerSpec:
        stage = self._stages.get(rank // self._spec.tp)
        return msgspec.structs.replace(self._spec, rank=rank, shared_memory=stage, link_memory=self._links)

    def close(self) -> None:
        """Closes the descriptors in this process; the memory is gone with the last rank."""
        for file in (*self._stages.values(), *(() if self._links is None else (self._links,))):
            os.close(file)


def uses_shared_memory(spec: WorkerSpec) -> bool:
    """Whether the ranks of a host can use the collectives and links of the CPU kernels."""
    is_several = len(spec.host_ranks) > 1
    return is_several and spec.device == "cpu" and spec.kernels != "reference" and hasattr(os, "memfd_create")


def _start(spec: WorkerSpec, connection: int, interface: str | None, module: str) -> WorkerProcess:
    environment = dict(os.environ)
    num_processes = max(len(spec.host_ranks), spec.num_workers)
    if max(num_processes, spec.num_ranks) > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
        if interface is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Processes of the worker import this package from where this process has it.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return WORKERS.start(spec, module, connection, environment)
