"""Starts the FFN workers of an engine, links them to its attention workers, and replaces those that end."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

import msgspec

from sageLLM.runtime.errors import EngineError, SageError
from sageLLM.runtime.execution_graph.attention_ffn import Side
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.point_to_point import make_pair_memory
from sageLLM.runtime.worker.af_link import LinkOffer, send_offer
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.process_executor import START_SECONDS, await_ready
from sageLLM.runtime.worker.rank import Rank
from sageLLM.runtime.worker.rank_processes import start_rank

FFN_WORKER = "sageLLM.runtime.worker.ffn_process"
MAX_STARTS = 3
"""The number of times in a row that a worker is started; it may be killed while it loads."""


class FfnWorkers:
    """FFN worker processes, and the channels on which attention workers ask for links to all of them.

    A thread answers, and starts a worker again that has ended. If one does not start, the channels are closed: the
    attention workers that need it fail.
    """

    def __init__(self, spec: WorkerSpec, sides: Sequence[Side], ring_bytes: int) -> None:
        """Starts a worker for each side; `ring_bytes` must hold the rows of a step. Raises what `load_model` raises."""
        self._state = _State(spec, sides, ring_bytes if can_share_memory(spec) else 0)
        try:
            self._state.start_all()
        except BaseException:
            self._state.end()
            raise
        self._finalizer = weakref.finalize(self, _State.end, self._state)
        self._thread = threading.Thread(target=self._state.run, name="sagellm-ffn-workers", daemon=True)
        self._thread.start()

    @property
    def process_ids(self) -> list[int]:
        """The operating system's ids of the worker processes, by rank."""
        return [worker.process.pid for worker in self._state.workers]

    @property
    def num_restarts(self) -> int:
        """Workers that have ended, with a new one in their place."""
        return self._state.num_restarts

    def join(self, attention_rank: int) -> int:
        """The descriptor of a new channel for an attention worker that is about to start; it replaces the last one."""
        return self._state.open_channel(attention_rank)

    def close(self) -> None:
        self._finalizer()
        self._thread.join()


def can_share_memory(spec: WorkerSpec) -> bool:
    """Whether micro-batches can travel through shared memory, by kernels of the CPU."""
    is_native = spec.device == "cpu" and spec.kernels in ("auto", "cpu")
    return is_native and hasattr(os, "memfd_create") and find_compiler() is not None


def has_ended(worker: Rank) -> bool:
    """Whether a worker has closed its connection, on which it sends nothing once it is ready, or has ended."""
    return worker.process.poll() is not None or worker.connection.poll()


class _State:
    """Everything that the thread uses, which must not keep the `FfnWorkers` alive."""

    def __init__(self, spec: WorkerSpec, sides: Sequence[Side], ring_bytes: int) -> None:
        self.workers: list[Rank] = []
        self.num_restarts = 0
        self._specs = [msgspec.structs.replace(spec, side=side) for side in sides]
        self._ring_bytes = ring_bytes
        self._channels: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._wake, self._woken = socket.socketpair()

    def start_all(self) -> None:
        for spec in self._specs:  # all load at the same time
            self.workers.append(start_rank(spec, FFN_WORKER))
        for worker in self.workers:
            await_ready(worker, time.monotonic() + START_SECONDS)

    def open_channel(self, attention_rank: int) -> int:
        ours, theirs = socket.socketpair()
        with self._lock:
            if self._is_closed:
                raise EngineError("an FFN worker does not start again")
            if (old := self._channels.pop(attention_rank, None)) is not None:
                old.close()
            self._channels[attention_rank] = ours
        self._wake.send(b".")
        return theirs.detach()

    def run(self) -> None:
        """Answers attention workers and replaces FFN workers, until `end`."""
        try:
            while not self._is_closed:
                self._wait()
                for rank, worker in enumerate(self.workers):
                    if has_ended(worker) and not self._is_closed:
                        self._replace(rank, worker)
                with self._lock:
                    channels = list(self._channels.items())
                for rank, channel in channels:
                    self._answer(rank, channel)
        except (SageError, EngineError) as error:
            LOG.error("an FFN worker does not start again: %s", error)
        finally:
            with self._lock:
                self._is_closed = True
                for channel in self._channels.values():
                    channel.close()

    def _wait(self) -> None:
        with self._lock:
            channels = list(self._channels.values())
        waiting: list[socket.socket | Connection] = [
            self._woken,
            *channels,
            *(worker.connection for worker in self.workers),
        ]
        with suppress(OSError, ValueError):  # a channel was closed meanwhile
            ready, _, _ = select.select(waiting, [], [], 1.0)
            if self._woken in ready:
                self._woken.recv(1024)

    def _replace(self, rank: int, worker: Rank) -> None:
        worker.await_end()
        LOG.warning("FFN worker %s; it is started again", worker.describe_end())
        worker.connection.close()
        for attempt in range(MAX_STARTS):
            self.workers[rank] = worker = start_rank(self._specs[rank], FFN_WORKER)
            try:
                await_ready(worker, time.monotonic() + START_SECONDS)
                self.num_restarts += 1
                return
            except EngineError as error:  # it has ended meanwhile
                if attempt == MAX_STARTS - 1 or self._is_closed:
                    raise
                LOG.warning("%s; it is started again", error)
                worker.connection.close()
                worker.await_end()

    def _answer(self, rank: int, channel: socket.socket) -> None:
        """Sends links to all FFN workers, if the attention worker asks for them."""
        try:
            ready, _, _ = select.select([channel], [], [], 0)
            if not ready:
                return
            if not channel.recv(1):
                raise EOFError
            for peer, worker in enumerate(self.workers):
                self._link(rank, channel, peer, worker)
        except (OSError, ValueError, EOFError):
            with self._lock:
                if self._channels.get(rank) is channel:  # the worker has ended
                    del self._channels[rank]
            channel.close()

    def _link(self, rank: int, channel: socket.socket, peer: int, worker: Rank) -> None:
        ends = socket.socketpair()
        memory = [make_pair_memory(self._ring_bytes)] if self._ring_bytes else []
        try:
            offers = LinkOffer(rank, 0, self._ring_bytes), LinkOffer(peer, 1, self._ring_bytes)
            # An FFN worker that has just ended cannot take its end, which is then closed here.
            with suppress(OSError), socket.socket(fileno=os.dup(worker.connection.fileno())) as target:
                send_offer(target, offers[0], [ends[0].fileno(), *memory])
            send_offer(channel, offers[1], [ends[1].fileno(), *memory])
        finally:
            for end in ends:
                end.close()
            for file in memory:
                os.close(file)

    def end(self) -> None:
        """Ends the processes and the thread."""
        self._is_closed = True
        with suppress(OSError):
            self._wake.send(b".")
        _end_all(self.workers)


def _end_all(workers: Sequence[Rank]) -> None:
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.await_end()
