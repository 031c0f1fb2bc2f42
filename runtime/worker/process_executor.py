"""Runs the workers of an engine as processes, one for each tensor-parallel rank of each pipeline stage."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import msgspec

from sageLLM.runtime.errors import EngineError, SageError
from sageLLM.runtime.kernels.cpu.communicator import make_shared_memory
from sageLLM.runtime.kernels.cpu.point_to_point import make_link_memory
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.executor import WorkersLostError
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.orders import GroupOrder, StepResult
from sageLLM.runtime.worker.process import Done, Failed, Ready, Refused, Reply, Reset, Run

START_SECONDS = 600.0
"""The deadline of the start: loading the weights, and compiling the kernels the first time."""
STEP_SECONDS = 300.0
"""The deadline of a step; a worker that takes longer counts as hung."""
END_SECONDS = 2.0
WORKER = "sageLLM.runtime.worker.process"


@dataclass(frozen=True, slots=True)
class Rank:
    """A worker process and the engine's end of its socket."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection

    def hang_up(self) -> None:
        """Lets the process read the end of its commands, after which it ends."""
        with suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            end.shutdown(socket.SHUT_WR)

    def await_end(self) -> None:
        """Waits for the end of the process, and kills it if that takes too long."""
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def describe_end(self) -> str:
        """How the process has ended, in words."""
        code = self.process.poll()
        if code is None:
            return f"rank {self.rank} (process {self.process.pid}) closed its connection"
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"rank {self.rank} (process {self.process.pid}) {how}"


class ProcessExecutor:
    """Workers in separate processes. All ranks get every order, and a rank of the last stage returns the results.

    A thread reads the replies. If a rank dies, fails or exceeds the deadline of a step, all ranks are ended and the
    futures of all orders raise WorkersLostError.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        step_seconds: float = STEP_SECONDS,
        open_channel: Callable[[], int] | None = None,
    ) -> None:
        """Starts the workers. Raises what `load_model` raises, and EngineError if a process does not start.

        `open_channel` returns a new descriptor for `spec.af_channel` at each start.
        """
        self._spec, self.step_seconds, self._open_channel = spec, step_seconds, open_channel
        self._encoder = msgspec.msgpack.Encoder()
        self._lock = threading.Lock()
        self._pending: deque[tuple[float, Future[list[StepResult]]]] = deque()
        self._group = self._start_group()
        self._finalizer = weakref.finalize(self, _Group.end, self._group)
        self._start_reader()

    @property
    def process_ids(self) -> list[int]:
        """The operating system's ids of the worker processes, by rank."""
        return [rank.process.pid for rank in self._group.ranks]

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

    def wait(self) -> None:
        wait([future for _, future in list(self._pending)])

    def reset(self) -> None:
        self.wait()
        if self._group.lost is None:
            self._send(self._encoder.encode(Reset()))
        if self._group.lost is not None:
            self.restart()

    def restart(self) -> None:
        self.close()
        try:
            self._group = self._start_group()
        except SageError as error:  # the checkpoint has changed since the first start
            raise EngineError(f"the workers do not start again: {error}") from error
        self._finalizer = weakref.finalize(self, _Group.end, self._group)
        self._start_reader()

    def close(self) -> None:
        self._finalizer()
        self._reader.join()
        for rank in self._group.ranks:
            rank.connection.close()

    def _start_group(self) -> _Group:
        if self._open_channel is None:
            return _Group.start(self._spec)
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
        arguments = (self._group, self._pending, self._lock)
        self._reader = threading.Thread(target=_read_replies, args=arguments, name="sagellm-replies", daemon=True)
        self._reader.start()


class _Group:
    """The processes of one start."""

    def __init__(self, ranks: Sequence[Rank], folder: Path) -> None:
        self.ranks = ranks
        self.lost: str | None = None
        self._folder = folder

    @classmethod
    def start(cls, spec: WorkerSpec) -> _Group:
        folder = Path(tempfile.mkdtemp(prefix="sagellm-"))  # readable by this user only
        group = cls([], folder)
        memory = _SharedMemory(spec)
        try:
            spec = msgspec.structs.replace(spec, rendezvous=str(folder / "rendezvous"), link_memory=memory.links)
            group.ranks = [
                start_rank(msgspec.structs.replace(spec, rank=rank, shared_memory=memory.stages[rank // spec.tp]))
                for rank in range(spec.num_ranks)
            ]
            deadline = time.monotonic() + START_SECONDS
            for rank in group.ranks:
                await_ready(rank, deadline)
        except BaseException:
            group.end()
            raise
        finally:
            memory.close()
        return group

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
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.process.kill()


class _SharedMemory:
    """Descriptors of memory for the collectives of each stage and for the links of all ranks, None if not used."""

    def __init__(self, spec: WorkerSpec) -> None:
        is_used = uses_shared_memory(spec)
        self.stages = [make_shared_memory(spec.tp) if is_used and spec.tp > 1 else None for _ in range(spec.pp)]
        self.links = make_link_memory(spec.num_ranks) if is_used and spec.pp > 1 else None

    def close(self) -> None:
        """Closes the descriptors in this process; the memory is gone with the last rank."""
        for file in (*self.stages, self.links):
            if file is not None:
                os.close(file)


def uses_shared_memory(spec: WorkerSpec) -> bool:
    """Whether the ranks can use the collectives and links of the CPU kernels."""
    return spec.num_ranks > 1 and spec.device == "cpu" and spec.kernels != "reference" and hasattr(os, "memfd_create")


def start_rank(spec: WorkerSpec, module: str = WORKER) -> Rank:
    """Starts a worker process that runs a module, and sends it the spec."""
    ours, theirs = socket.socketpair()
    environment = dict(os.environ)
    num_processes = spec.num_ranks if spec.side is None else spec.num_workers
    if num_processes > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The child imports this package from where this process has it.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    inherited = [file for file in (spec.shared_memory, spec.link_memory, spec.af_channel) if file is not None]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno(), *inherited],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    connection = Connection(ours.detach())
    connection.send_bytes(msgspec.msgpack.encode(spec))
    return Rank(spec.rank, process, connection)


def await_ready(rank: Rank, deadline: float) -> None:
    """Waits until a worker is built. Raises SageError for an input of the user, and EngineError for other failures."""
    if not rank.connection.poll(max(0.0, deadline - time.monotonic())):
        raise EngineError(f"worker rank {rank.rank} has not started within {START_SECONDS:.0f} s")
    try:
        reply = msgspec.msgpack.decode(rank.connection.recv_bytes(), type=Reply)
    except (EOFError, OSError):
        rank.process.wait()
        raise EngineError(f"a worker has ended while it was started: {rank.describe_end()}") from None
    if isinstance(reply, Refused):
        raise SageError(reply.message)
    if not isinstance(reply, Ready):
        message = reply.message if isinstance(reply, Failed) else "an unexpected reply"
        raise EngineError(f"worker rank {rank.rank} has failed while it was started: {message}")


def _read_replies(group: _Group, pending: deque[tuple[float, Future[list[StepResult]]]], lock: threading.Lock) -> None:
    """Hands the results to the futures, until the group is lost."""
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
            _read_reply(rank, group, decoder, pending, lock)
    with lock:
        lost = [future for _, future in pending]
        pending.clear()
    group.kill()
    for future in lost:
        future.set_exception(WorkersLostError(group.lost))


def _read_reply(
    rank: Rank,
    group: _Group,
    decoder: msgspec.msgpack.Decoder[Reply],
    pending: deque[tuple[float, Future[list[StepResult]]]],
    lock: threading.Lock,
) -> None:
    try:
        reply = decoder.decode(rank.connection.recv_bytes())
    except (EOFError, OSError):
        time.sleep(0.01)  # for the exit code
        group.lose(rank.describe_end())
        return
    if isinstance(reply, Done):
        with lock:
            _, future = pending.popleft()
        future.set_result(reply.results)
    else:
        message = reply.message if isinstance(reply, Failed) else "sent an unexpected reply"
        LOG.error("worker rank %d: %s", rank.rank, message)
        group.lose(f"rank {rank.rank} failed: {message}")
