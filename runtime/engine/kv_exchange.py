"""Copies the KV of prompts between engines in different processes, over TCP.

An engine that prefills keeps the KV of a prompt for a while (`KVKeeper`). Another one reserves blocks, asks for it by a
ticket, checks its digest, and has it in its prefix cache before the request is queued (`KVFetcher`). If anything fails,
the prompt is computed there.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.transport import channel
from sageLLM.runtime.transport.base import Place, Report
from sageLLM.runtime.transport.handle import End, Handle, PieceKey, sign
from sageLLM.runtime.transport.rows import best_digest
from sageLLM.runtime.transport.shards import Part, PoolShard
from sageLLM.runtime.transport.sockets import Connections, limit_waits
from sageLLM.runtime.transport.tcp import LOOPBACK, TcpTransport
from sageLLM.runtime.transport.ticket import (
    Fetch,
    Fetched,
    MessageError,
    NotFetched,
    Ticket,
    TicketError,
    decode_answer,
    decode_fetch,
    encode,
    hash_prompt,
)
from sageLLM.runtime.worker.executor import InProcessExecutor
from sageLLM.runtime.worker.faults import LOG

if TYPE_CHECKING:
    from sageLLM.runtime.engine.engine import Engine
    from sageLLM.runtime.scheduler.handover import Handover

KEEP_SECONDS = 30.0
"""KV that has not been fetched for so long is released."""
CONNECT_SECONDS, FETCH_SECONDS = 1.0, 10.0
"""The times to connect and to copy, after which the prompt is computed."""
KEPT_SHARE = 0.5
"""The share of the pool that kept prompts may hold; the oldest ones are released first."""
CHECK_SECONDS = 0.1
"""The interval between two looks at whether the engine is being closed."""
NUM_FETCHES = 4
"""Fetches at the same time; further ones wait."""
MAX_MESSAGE_BYTES = 2**22
SOURCE, TARGET = 0, 1
"""The numbers of the two workers of a copy."""


class KVPort:
    """The transport of an engine with one rank in this process; distributes reports by their copies."""

    def __init__(self, engine: Engine, worker: int, key: bytes, host: str, weights: str) -> None:
        """`weights` is a digest of them. Raises SageError for an engine whose KV is not in one pool of this process."""
        if not isinstance(engine.executor, InProcessExecutor) or engine.is_strict:
            raise SageError("KV is copied between engines of one rank and one pool; set --tensor-parallel-size 1")
        pool = engine.executor.decoder.runner.pool
        if pool.lower is not None or pool.device.type != "cpu":
            raise SageError("KV is copied between engines on CPUs, without a lower tier; set --device cpu")
        part = Part(range(pool.num_layers), range(pool.shape.k[0]))
        values = () if pool.shape.is_shared else pool.values
        types = f"{engine.model.dtype} {pool.keys[0].dtype}"  # the second one says the form of a KV cache of codes
        self.model = f"{engine.model.layout.name} {types} {pool.num_layers} {pool.shape} {weights}"
        self.epoch, self.key, self.block_size = secrets.randbits(62), key, pool.block_size
        self.num_blocks = pool.num_device_blocks
        place = Place(worker, 0, self.epoch, [[part], [part]], key, best_digest())
        self.transport = TcpTransport(place, host)
        self.transport.register(PoolShard(part, pool.block_size, pool.keys, values))
        self._ends: list[tuple[PieceKey, SimpleQueue[Report]]] = []
        self.is_closed = False
        threading.Thread(target=self._distribute, name="sagellm-kv-reports", daemon=True).start()

    def expect(self, key: PieceKey) -> SimpleQueue[Report]:
        """A queue of the reports about a copy, but for those that renew its lease; `forget` ends it."""
        reports: SimpleQueue[Report] = SimpleQueue()
        self._ends.append((key, reports))
        return reports

    def forget(self, key: PieceKey, reports: SimpleQueue[Report]) -> None:
        self._ends.remove((key, reports))

    def stop(self, key: PieceKey) -> None:
        """Returns when nothing reads or writes for a copy any more, and nothing will; all queues get this report."""
        reports = self.expect(key)
        try:
            self.transport.cancel(key)
            while not self.is_closed and reports.get().kind != "stopped":
                pass
        finally:
            self.forget(key, reports)

    def close(self) -> None:
        """Stops all copies; those that wait for a report get one."""
        self.transport.close()
        self.is_closed = True
        for key, reports in list(self._ends):
            reports.put(Report("stopped", key, 0, reason="the engine is being closed"))

    def _distribute(self) -> None:
        while reports := self.transport.poll(None):
            for report in reports:
                queues = [queue for key, queue in list(self._ends) if key == report.key and report.kind != "alive"]
                for queue in queues:
                    queue.put(report)


@dataclass(slots=True)
class _Kept:
    """Blocks with the beginning of a prompt. `num_readers` copies read them; afterwards they are of no use."""

    handover: Handover
    name: str
    blocks: list[int]
    expires: float
    num_readers: int = 0
    is_done: bool = False
    is_lost: bool = False


class KVKeeper:
    """Keeps the KV of prompts until it is fetched, or for `keep_seconds`; used by the engine's thread."""

    def __init__(
        self, engine: Engine, key: bytes, weights: str, host: str = LOOPBACK, keep_seconds: float = KEEP_SECONDS
    ) -> None:
        """KV is for engines with the same digest of `weights`. Raises SageError, also for a host of another machine."""
        self._engine, self._keep_seconds = engine, keep_seconds
        self._port = KVPort(engine, SOURCE, key, host, weights)
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()
        listener = channel.listen(host, 0)
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._connections = Connections(listener, "sagellm-kv-keeper", self._serve)

    @property
    def epoch(self) -> int:
        return self._port.epoch

    def keep(self, request_id: str, token_ids: list[int], salt: str) -> Ticket:
        """Keeps the full blocks of a prompt whose prefill has just ended; returns the ticket for them."""
        handover, name = self._engine.scheduler.handover, f"kept {request_id}"
        # One more token, as the last one of a sequence never counts as cached.
        handover.lend(name, [*token_ids, token_ids[-1]], salt)
        kept = _Kept(handover, name, handover.blocks_of(name), time.monotonic() + self._keep_seconds)
        with self._lock:
            self._kept[request_id] = kept
        self.release_due()
        return Ticket(*self.address, self.epoch, request_id, hash_prompt(token_ids, salt))

    def release_due(self) -> None:
        """Releases what has been fetched or has expired, and the oldest if too much is kept."""
        now, found = time.monotonic(), list[_Kept]()
        with self._lock:
            num_blocks = sum(len(one.blocks) for one in self._kept.values())
            for request_id, one in list(self._kept.items()):  # the oldest first
                if one.num_readers:
                    continue
                if one.is_done or now > one.expires or num_blocks > KEPT_SHARE * self._port.num_blocks:
                    num_blocks -= len(one.blocks)
                    found.append(self._kept.pop(request_id))
        for one in found:
            one.handover.end_loan(one.name)

    def reset(self) -> None:
        """The engine has lost its KV: copies that read it now are refused at their end."""
        with self._lock:
            for one in self._kept.values():
                one.is_lost = True
            self._kept.clear()

    def close(self) -> None:
        self._connections.close()
        self._port.close()

    # --- threads of the server ---

    def _serve(self, stream: socket.socket) -> None:
        limit_waits(stream, FETCH_SECONDS)
        try:
            with Connection(os.dup(stream.fileno())) as connection, suppress(OSError, EOFError, MessageError):
                channel.challenge(connection, self._port.key)
                fetch = decode_fetch(connection.recv_bytes(MAX_MESSAGE_BYTES))
                connection.send_bytes(encode(self._answer(fetch)))
        except channel.AuthenticationError as error:
            LOG.warning("a connection to the KV of prompts was refused: %s", error)

    def _answer(self, fetch: Fetch) -> Fetched | NotFetched:
        if fetch.model != self._port.model:
            return NotFetched(f"the engines differ: {fetch.model} and {self._port.model}")
        if fetch.ticket.epoch != self.epoch:
            return NotFetched("the engine with the KV has been started again")
        with self._lock:
            kept = self._kept.get(fetch.ticket.request_id)
            if kept is None or kept.is_done:
                return NotFetched("the KV has been released")
            kept.num_readers += 1
        try:
            return self._push(fetch, kept)
        finally:
            with self._lock:
                kept.num_readers -= 1

    def _push(self, fetch: Fetch, kept: _Kept) -> Fetched | NotFetched:
        start, size = fetch.key.start, self._port.block_size
        num_tokens = min(fetch.num_tokens, len(kept.blocks) * size - start)
        if num_tokens <= 0:
            return NotFetched("the engine has only KV of tokens before these")
        blocks = kept.blocks[start // size : -(-(start + num_tokens) // size)]
        source = End(SOURCE, self.epoch, blocks)
        handle = sign(Handle(*self._names(fetch), num_tokens, source, fetch.target), self._port.key)
        reports = self._port.expect(fetch.key)
        try:
            self._port.transport.push(handle, [fetch.address])
            try:
                report = reports.get(timeout=FETCH_SECONDS)
            except Empty:
                self._port.stop(fetch.key)
                return NotFetched(f"the copy took longer than {FETCH_SECONDS:g} s")
        finally:
            self._port.forget(fetch.key, reports)
        if report.kind != "pushed" or kept.is_lost:
            return NotFetched(report.reason or "the engine with the KV has lost it")
        kept.is_done = True
        return Fetched(handle, report.digests[0], num_tokens)

    @staticmethod
    def _names(fetch: Fetch) -> tuple[str, int, int]:
        return fetch.key.request_id, fetch.key.attempt, fetch.key.start


class FetchError(Exception):
    """The KV has not arrived."""


OnEnd = Callable[[str, int, str], None]
"""Gets the name of a loan, the number of leading tokens with KV here, and the reason if none have arrived."""


class KVFetcher:
    """Fetches the KV of prompts into the prefix cache of an engine; used by the engine's thread."""

    def __init__(self, engine: Engine, key: bytes, weights: str, host: str = LOOPBACK) -> None:
        """KV comes from engines with the same digest of `weights`. Raises SageError."""
        self._engine, self._port = engine, KVPort(engine, TARGET, key, host, weights)
        self._threads = ThreadPoolExecutor(NUM_FETCHES, "sagellm-kv-fetch")
        self._borrowed: dict[str, Handover] = {}
        self._waiting: list[tuple[Fetch, OnEnd]] = []
        self._running: set[PieceKey] = set()

    def begin(self, ticket: Ticket, token_ids: list[int], salt: str, on_end: OnEnd) -> str | None:
        """Reserves blocks for the full blocks of a prompt, and fetches what is missing.

        Returns the name of the loan, which `finish` ends; None if nothing is missing or there is no room. `on_end` is
        called in another thread. Raises TicketError for the ticket of another prompt.
        """
        if ticket.prompt != hash_prompt(token_ids, salt):
            raise TicketError("it is that of another prompt")
        handover, name = self._engine.scheduler.handover, f"fetch {secrets.token_hex(8)}"
        size = self._port.block_size
        num_tokens = (len(token_ids) - 1) // size * size  # the last token is always computed
        start = handover.borrow(name, token_ids[: num_tokens + 1], salt, num_tokens) if num_tokens else None
        if start is None:
            return None
        self._borrowed[name] = handover
        if start >= num_tokens:
            self.finish(name, 0)
            return None
        target = End(TARGET, self._port.epoch, handover.blocks_of(name)[start // size :])
        key, address = PieceKey(name, start, 0), self._port.transport.address
        self._waiting.append((Fetch(ticket, key, num_tokens - start, target, address, self._port.model), on_end))
        self.start_ready()
        return name

    def start_ready(self) -> None:
        """Starts the copies to blocks that no pending step writes to."""
        ready = [one for one in self._waiting if self._borrowed[one[0].key.request_id].is_ready(one[0].key.request_id)]
        for one in ready:
            self._waiting.remove(one)
            self._running.add(one[0].key)
            self._threads.submit(self._run, *one)

    def finish(self, name: str, num_arrived: int) -> None:
        """Ends a loan: the first tokens are in the prefix cache from now on."""
        handover = self._borrowed.pop(name, None)
        if handover is not None:
            handover.end_loan(name, num_arrived)

    def reset(self) -> None:
        """The engine has lost its KV: ends all loans, when nothing is written to their blocks any more.

        That is at once, or after a second if a source has stopped within a piece; the fetches end by themselves.
        """
        self._borrowed.clear()
        self._waiting.clear()
        running, self._running = self._running, set()
        for key in list(running):
            self._port.stop(key)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._port.close()

    # --- threads of copies ---

    def _run(self, fetch: Fetch, on_end: OnEnd) -> None:
        num_arrived, reason = 0, ""
        reports = self._port.expect(fetch.key)
        try:
            num_arrived = fetch.key.start + self._copy(fetch, reports)
        except (FetchError, SageError, OSError, EOFError, MessageError) as error:
            reason = str(error) or type(error).__name__
            self._port.stop(fetch.key)
        finally:
            self._port.forget(fetch.key, reports)
            self._running.discard(fetch.key)
        on_end(fetch.key.request_id, num_arrived, reason)

    def _copy(self, fetch: Fetch, reports: SimpleQueue[Report]) -> int:
        """The number of tokens that have arrived, verified."""
        connection = channel.connect(fetch.ticket.host, fetch.ticket.port, self._port.key, CONNECT_SECONDS)
        with connection:
            connection.send_bytes(encode(fetch))
            self._await_answer(connection, fetch.key)
            answer = decode_answer(connection.recv_bytes(MAX_MESSAGE_BYTES))
        if isinstance(answer, NotFetched):
            raise FetchError(answer.reason)
        self._port.transport.check(answer.handle, [answer.digest])
        try:
            report = reports.get(timeout=FETCH_SECONDS)
        except Empty:
            raise FetchError("the handle is not that of the fetch") from None
        if report.kind != "received":
            raise FetchError(report.reason)
        return answer.num_tokens

    def _await_answer(self, connection: Connection, key: PieceKey) -> None:
        deadline = time.monotonic() + FETCH_SECONDS
        while not connection.poll(CHECK_SECONDS):
            if self._port.is_closed:
                raise FetchError("the engine is being closed")
            if key not in self._running:
                raise FetchError("the engine has lost its KV")
            if time.monotonic() > deadline:
                raise FetchError(f"no answer within {FETCH_SECONDS:g} s")
