"""Runs the workers of an engine as processes, one for each tensor-parallel rank of each pipeline stage."""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from multiprocessing.connection import wait as wait_for

import msgspec
from torch._C._distributed_c10d import TCPStore

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.errors import EngineError, SageError
from sageLLM.runtime.transport.base import Report
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.cluster import Cluster
from sageLLM.runtime.worker.executor import WorkersLostError
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.fingerprint import difference
from sageLLM.runtime.worker.io_report import IoReport
from sageLLM.runtime.worker.kv_group import KVCommand
from sageLLM.runtime.worker.orders import GroupOrder, StepResult
from sageLLM.runtime.worker.process import Done, Failed, IoReported, Ready, Refused, Reply, ReportIo, Reset, Run
from sageLLM.runtime.worker.rank import Rank, RemoteRank
from sageLLM.runtime.worker.rank_processes import start_ranks
from sageLLM.runtime.worker.rendezvous import RendezvousFile

Listener = Callable[["Report | None"], None]
"""Gets the reports of the ranks, and None when the workers are lost or ended."""

START_SECONDS = 600.0
"""The deadline of the start: loading the weights, and compiling the kernels the first time."""
STEP_SECONDS = 300.0
"""The deadline of a step; a worker that takes longer counts as hung."""


class ProcessExecutor:
    """Workers in separate processes. All ranks get every order, and a rank of the last stage returns the results.

    A thread reads the replies. If a rank dies, fails or exceeds the deadline of a step, all ranks are ended and the
    futures of all orders raise WorkersLostError.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        cluster: Cluster | None = None,
        *,
        step_seconds: float = STEP_SECONDS,
        open_channel: Callable[[], int] | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Starts the workers, some of them on the other hosts of a `cluster`, which is closed with the executor.

        `open_channel` returns a new descriptor for `spec.af_channel` at each start. `listener` is called in the thread
        of the replies. Raises what `load_model` raises, and EngineError if a process does not start.
        """
        self._spec, self.step_seconds, self._open_channel = spec, step_seconds, open_channel
        self._cluster, self._listener = cluster, listener
        self._encoder = msgspec.msgpack.Encoder()
        self._lock = threading.Lock()
        self._pending: deque[tuple[float, Future[list[StepResult]]]] = deque()
        self._cluster_finalizer = None if cluster is None else weakref.finalize(self, Cluster.close, cluster)
        self._group = self._start_group()
        self._facts = self._group.facts
        self._finalizer = weakref.finalize(self, _Group.end, self._group)
        self._start_reader()

    @property
    def process_ids(self) -> list[int]:
        """The operating system's ids of the worker processes of this host, by rank."""
        return [rank.process.pid for rank in self._group.ranks if isinstance(rank, Rank)]

    @property
    def addresses(self) -> list[str]:
        """The addresses of the ranks' KV transports."""
        return self._group.addresses

    @property
    def lost(self) -> str | None:
        """The reason why the workers are lost, or None."""
        return self._group.lost

    def send(self, command: KVCommand) -> None:
        """Lets all ranks copy KV. Their reports go to the listener; lost workers make none."""
        if self._group.lost is None:
            self._send(self._encoder.encode(command))

    def kill(self, reason: str) -> None:
        """Ends the workers, which count as lost."""
        self._group.lose(reason)
        self._group.kill()

    def submit(self, order: GroupOrder) -> Future[list[StepResult]]:
        future: Future[list[StepResult]] = Future()
        data = self._encoder.encode(Run(order))
        with self._lock:
            if self._group.lost is not None:
                future.set_exception(WorkersLostError(self._group.lost))
                return future
            self._pending.append((time.monotonic() + self.step_seconds, future))
        self._send(data)
        return future

    def io_reports(self, hardware: Hardware) -> list[IoReport]:
        """The transfers between tiers of each graph that has run, of all ranks; empty if workers are lost meanwhile."""
        self.wait()
        group, found = self._group, dict[int, list[IoReport]]()
        self._send(self._encoder.encode(ReportIo(hardware)))
        while len(found) < len(group.ranks) and group.lost is None:
            with suppress(queue.Empty):
                rank, reports = group.io_reports.get(timeout=1.0)
                found[rank] = reports
        return [one.of_rank(rank) for rank in sorted(found) for one in found[rank]]

    def wait(self) -> None:
        wait([future for _, future in list(self._pending)])

    def reset(self) -> None:
        self.wait()
        if self._group.lost is None:
            self._send(self._encoder.encode(Reset()))
        if self._group.lost is not None:
            self.restart()

    def restart_in_epoch(self, epoch: int) -> None:
        """As `restart`, for a worker of a group."""
        assert self._spec.group is not None, "the worker must be one of a group"
        group = msgspec.structs.replace(self._spec.group, epoch=epoch)
        self._spec = msgspec.structs.replace(self._spec, group=group)
        self.restart()

    def restart(self) -> None:
        self._end_group()
        try:
            self._group = self._start_group()
        except SageError as error:  # the checkpoint has changed since the first start
            raise EngineError(f"the workers do not start again: {error}") from error
        if (differing := difference(self._facts, self._group.facts)) is not None:
            self._group.end()
            raise EngineError(f"the workers do not start again: the checkpoint has changed meanwhile, {differing}")
        self._finalizer = weakref.finalize(self, _Group.end, self._group)
        self._start_reader()

    def close(self) -> None:
        self._end_group()
        if self._cluster_finalizer is not None:
            self._cluster_finalizer()

    def _end_group(self) -> None:
        self._finalizer()
        self._reader.join()
        for rank in self._group.ranks:
            rank.connection.close()

    def _start_group(self) -> _Group:
        if self._open_channel is None:
            return _Group.start(self._spec, self._cluster)
        channel = self._open_channel()
        try:
            return _Group.start(msgspec.structs.replace(self._spec, af_channel=channel))
        finally:
            os.close(channel)

    def _send(self, data: bytes) -> None:
        for rank in self._group.ranks:
            try:
                rank.connection.send_bytes(data)
            except OSError:
                self._group.lose(rank.describe_end())  # the reader ends the group

    def _start_reader(self) -> None:
        # The thread must not keep the executor alive, whose finalizer ends the processes.
        arguments = (self._group, self._pending, self._lock, self._listener)
        self._reader = threading.Thread(target=_read_replies, args=arguments, name="sagellm-replies", daemon=True)
        self._reader.start()


class _Group:
    """The processes of one start."""

    def __init__(self, cluster: Cluster | None) -> None:
        self.ranks: list[Rank | RemoteRank] = []
        self.lost: str | None = None
        self.addresses: list[str] = []
        self.facts: Mapping[str, str] = {}
        self.io_reports: queue.SimpleQueue[tuple[int, list[IoReport]]] = queue.SimpleQueue()
        self._cluster, self._rendezvous = cluster, None if cluster is not None else RendezvousFile()
        self._store: TCPStore | None = None

    @classmethod
    def start(cls, spec: WorkerSpec, cluster: Cluster | None = None) -> _Group:
        group = cls(cluster)
        try:
            group._start_ranks(spec)
            group._await_ranks(time.monotonic() + START_SECONDS)
            if spec.device == "cpu":  # the ranks are connected; NCCL connects them in the first collective
                group._close_rendezvous()
        except BaseException:
            group.lose("the start has failed")
            group.end()
            raise
        return group

    def _start_ranks(self, spec: WorkerSpec) -> None:
        interface: str | None = "lo"
        own = range(spec.num_ranks)
        if self._rendezvous is not None:
            spec = self._rendezvous.added_to(spec)
        if self._cluster is not None:
            address = self._cluster.node.address
            self._store = TCPStore(address, 0, None, True, wait_for_workers=False)
            spec = msgspec.structs.replace(spec, rendezvous=f"{address}:{self._store.port}")
            interface, own = self._cluster.interface, self._cluster.ranks_of(0)
        self.ranks += start_ranks(spec, own, interface)
        if self._cluster is not None:
            self.ranks += self._cluster.start(spec)

    def _await_ranks(self, deadline: float) -> None:
        for rank in self.ranks:
            ready = await_ready(rank, deadline)
            self.facts = self.facts or ready.facts
            self.addresses.append(ready.address)
            if (differing := difference(self.facts, ready.facts)) is not None:
                raise EngineError(f"{rank.name} differs from rank 0: {differing}; all ranks must agree")

    def lose(self, reason: str) -> None:
        """Records the first reason why the group is of no use any more."""
        if self.lost is None:
            self.lost = reason

    def end(self) -> None:
        """Ends the processes. The engine's ends of the sockets stay open, as the reader may wait for them."""
        if self.lost is not None:
            self.kill()  # the others may wait in a collective for one that has died
        self.lose("the engine is closed")
        for rank in self.ranks:
            rank.hang_up()
        for rank in self.ranks:
            rank.await_end()
        self._store = None
        self._close_rendezvous()

    def _close_rendezvous(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.close()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        if self._cluster is not None:
            self._cluster.stop()


def await_ready(rank: Rank | RemoteRank, deadline: float) -> Ready:
    """Waits until a worker is built. Raises SageError for an input of the user, and EngineError for other failures."""
    if not rank.connection.poll(max(0.0, deadline - time.monotonic())):
        raise EngineError(f"{rank.name} has not started within {START_SECONDS:.0f} s")
    try:
        reply = msgspec.msgpack.decode(rank.connection.recv_bytes(), type=Reply)
    except (EOFError, OSError):
        rank.await_end()
        raise EngineError(f"a worker has ended while it was started: {rank.describe_end()}") from None
    if isinstance(reply, Refused):
        raise SageError(reply.message)
    if not isinstance(reply, Ready):
        message = reply.message if isinstance(reply, Failed) else "an unexpected reply"
        raise EngineError(f"{rank.name} has failed while it was started: {message}")
    return reply


def _read_replies(
    group: _Group,
    pending: deque[tuple[float, Future[list[StepResult]]]],
    lock: threading.Lock,
    listener: Listener | None,
) -> None:
    """Hands the results to the futures, and reports to the listener, until the group is lost."""
    decoder = msgspec.msgpack.Decoder(Reply)
    by_connection = {rank.connection: rank for rank in group.ranks}
    while group.lost is None:
        with lock:
            deadline = pending[0][0] if pending else None
        if deadline is not None and time.monotonic() > deadline:
            group.lose("the step exceeded its deadline; a worker hangs")
            break
        for connection in wait_for(list(by_connection), timeout=1.0):
            rank = by_connection[connection]  # type: ignore[index]
            reply = _read_reply(rank, group, decoder, pending, lock)
            if reply is not None and listener is not None:
                listener(reply)
    with lock:
        lost = [future for _, future in pending]
        pending.clear()
    group.kill()
    for future in lost:
        future.set_exception(WorkersLostError(group.lost))
    if listener is not None:
        listener(None)


def _read_reply(
    rank: Rank | RemoteRank,
    group: _Group,
    decoder: msgspec.msgpack.Decoder[Reply],
    pending: deque[tuple[float, Future[list[StepResult]]]],
    lock: threading.Lock,
) -> Report | None:
    """Acts on a reply; returns it if it is a report."""
    try:
        reply = decoder.decode(rank.connection.recv_bytes())
    except (EOFError, OSError):
        group.lose(rank.describe_end())
        return None
    if isinstance(reply, Report):
        return reply
    if isinstance(reply, Done):
        with lock:
            _, future = pending.popleft()
        future.set_result(reply.results)
    elif isinstance(reply, IoReported):
        group.io_reports.put((rank.rank, reply.reports))
    else:
        message = reply.message if isinstance(reply, Failed) else "sent an unexpected reply"
        LOG.error("worker rank %d: %s", rank.rank, message)
        group.lose(f"rank {rank.rank} failed: {message}")
    return None
