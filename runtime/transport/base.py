"""KV transports: copy pieces of KV from the pool of one worker to that of another one, layer by layer.

The engine makes a signed `Handle` for each piece. The source worker pushes it, and reports a digest for each rank of
the target; the target worker checks its pool against the digests, and reports whether they agree. Until then the engine
admits nothing to decode. Every handle that was pushed or checked gets exactly one report from this rank.
"""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Literal, Protocol

import msgspec
import torch
from torch import Tensor

from sageLLM.runtime.transport.handle import Handle, HandleError, PieceKey, SignedHandle, open_handle
from sageLLM.runtime.transport.jobs import BACKGROUND, JobThread
from sageLLM.runtime.transport.shards import Part, PoolShard, Route, Span, routes_between

ALIVE_SECONDS = 0.5
"""The interval between two reports that renew the lease of a long piece."""
MAX_CANCELLED = 4096
"""Cancelled pieces that are remembered; a handle is older than that many cancellations only if it is lost."""

ReportKind = Literal["pushed", "received", "failed", "stopped", "alive"]


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Progress of one rank with a piece.

    - `pushed`: this rank's part has been written; `digests` maps ranks of the target to the CRC-32 of their parts.
    - `received`: the target's pool agrees with the digests of all source ranks.
    - `failed`: this rank has stopped, for the `reason`.
    - `stopped`: the answer to `cancel`; this rank does not read or write for the piece any more.
    - `alive`: this rank is still at work; it renews the lease of the transfer.
    """

    kind: ReportKind
    key: PieceKey
    rank: int
    digests: dict[int, int] = {}
    reason: str = ""


class LayerGate(Protocol):
    """Says when the KV of a layer has been computed."""

    def wait(self, layer: int) -> bool:
        """Waits until the layer is complete; false if the step has failed."""


class KVTransport(Protocol):
    """Moves pieces between registered pools. Calls return at once, and reports arrive by `poll`."""

    def register(self, pool: PoolShard) -> None:
        """Makes the pool of this rank the source of `push` and the subject of `check`."""

    def push(self, signed: SignedHandle, address: Sequence[str] = (), gate: LayerGate | None = None) -> None:
        """Copies a piece to the target's ranks, at these addresses if the transport has any."""

    def check(self, signed: SignedHandle, digests: Sequence[int]) -> None:
        """Compares this rank's pool with the digests of the source ranks that send to it, in their order."""

    def cancel(self, key: PieceKey) -> None:
        """Stops a piece, also one that has not begun; answered by `stopped`."""

    def poll(self, seconds: float | None = 0.0) -> list[Report]:
        """The reports since the last call; waits up to `seconds` (None: without limit) for the first one."""

    def close(self) -> None:
        """Stops everything; `poll` returns an empty list."""


@dataclass(frozen=True, slots=True)
class Place:
    """This rank in a group of workers: the number of its worker, its rank, its epoch, and the parts of all workers."""

    worker: int
    rank: int
    epoch: int
    parts: Sequence[Sequence[Part]]
    key: bytes

    def routes(self, handle: Handle) -> list[Route]:
        return routes_between(self.parts[handle.source.worker], self.parts[handle.target.worker])


class Stopped(Exception):
    """The piece was cancelled, or the step that computes it has failed."""


class QueuedTransport(ABC):
    """A transport that pushes pieces one after another, and checks them one after another.

    The thread of the checks has a low priority, as the worker decodes meanwhile.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._reports: SimpleQueue[Report | None] = SimpleQueue()
        self._cancelled: OrderedDict[PieceKey, None] = OrderedDict()
        self._lock = Lock()
        self._pool: PoolShard | None = None
        self._is_closed = False
        self._pushes = JobThread("sagellm-kv-push")
        self._checks = JobThread("sagellm-kv-check", BACKGROUND)

    @property
    def pool(self) -> PoolShard:
        assert self._pool is not None, "register must be called first"
        return self._pool

    def register(self, pool: PoolShard) -> None:
        self._pool = pool

    def push(self, signed: SignedHandle, address: Sequence[str] = (), gate: LayerGate | None = None) -> None:
        if (handle := self._accept(signed, is_source=True)) is not None:
            self._pushes.submit(lambda: self._push(handle, signed, address, gate))

    def check(self, signed: SignedHandle, digests: Sequence[int]) -> None:
        if (handle := self._accept(signed, is_source=False)) is not None:
            self._checks.submit(lambda: self._check(handle, digests))

    def cancel(self, key: PieceKey) -> None:
        with self._lock:
            self._cancelled[key] = None
            while len(self._cancelled) > MAX_CANCELLED:
                self._cancelled.popitem(last=False)
        self._interrupt(key)
        # After the jobs that may be at work on it, in both threads.
        self._pushes.submit(lambda: self._checks.submit(lambda: self._settle(key)))

    def poll(self, seconds: float | None = 0.0) -> list[Report]:
        try:
            found = [self._reports.get(seconds != 0, seconds or None)]
            while True:
                found.append(self._reports.get_nowait())
        except Empty:
            pass
        return [report for report in found if report is not None]

    def close(self) -> None:
        self._is_closed = True
        self._pushes.close()
        self._checks.close()
        self._reports.put(None)

    # --- for subclasses ---

    @abstractmethod
    def _send(self, handle: Handle, signed: SignedHandle, route: Route, address: str, rows: LayerRows) -> None:
        """Writes the rows of all layers to a rank of the target; returns when they are there. Raises OSError."""

    def _interrupt(self, key: PieceKey) -> None:
        """Wakes a `_send` that waits for the other end; by default none waits."""
        return

    def _settle(self, key: PieceKey) -> None:
        """Reports that a cancelled piece has stopped; nothing of it is being written any more."""
        self._report("stopped", key)

    def is_cancelled(self, key: PieceKey) -> bool:
        with self._lock:
            return key in self._cancelled or self._is_closed

    # --- jobs ---

    def _accept(self, signed: SignedHandle, *, is_source: bool) -> Handle | None:
        """The handle, if this rank may act on it; otherwise it is reported as failed."""
        try:
            handle = open_handle(signed, self._place.key)
        except HandleError as error:
            self._report("failed", PieceKey("", 0, 0), reason=str(error))
            return None
        end = handle.source if is_source else handle.target
        if (end.worker, end.epoch) != (self._place.worker, self._place.epoch):
            reason = f"the handle is for worker {end.worker} in epoch {end.epoch}"
            self._report("failed", handle.key, reason=f"{reason}, this is {self._place.worker} in {self._place.epoch}")
            return None
        return handle

    def _push(self, handle: Handle, signed: SignedHandle, address: Sequence[str], gate: LayerGate | None) -> None:
        digests = {}
        try:
            for route in self._place.routes(handle):
                if route.source == self._place.rank:
                    rows = LayerRows(self, handle, route, gate)
                    self._send(handle, signed, route, address[route.target] if address else "", rows)
                    digests[route.target] = rows.digest
        except Stopped:
            return  # `cancel` reports it
        except Exception as error:
            self._report("failed", handle.key, reason=f"{type(error).__name__}: {error}")
            return
        self._report("pushed", handle.key, digests=digests)

    def _check(self, handle: Handle, digests: Sequence[int]) -> None:
        if self.is_cancelled(handle.key):
            return
        routes = [route for route in self._place.routes(handle) if route.target == self._place.rank]
        span = Span(handle.start, handle.num_tokens, handle.target.blocks)
        found = [self._digest_of(route, span) for route in routes]
        if found == list(digests):
            self._report("received", handle.key)
        else:
            self._report("failed", handle.key, reason="the digests of the KV differ")

    def _digest_of(self, route: Route, span: Span) -> int:
        digest = 0
        for layer in route.layers:
            rows = [self.pool.read(cache, span, route.heads) for cache in self.pool.caches(layer)]
            digest = chain(digest, digest_of(rows))
        return digest

    def _report(self, kind: ReportKind, key: PieceKey, digests: dict[int, int] | None = None, reason: str = "") -> None:
        self._reports.put(Report(kind, key, self._place.rank, digests or {}, reason))

    def report_alive(self, key: PieceKey) -> None:
        self._report("alive", key)


class LayerRows:
    """The rows of a piece for one route, layer by layer as they are computed.

    `layer_digest` is that of the newest layer, and `digest` that of all layers so far.
    """

    def __init__(self, transport: QueuedTransport, handle: Handle, route: Route, gate: LayerGate | None) -> None:
        self._transport, self._handle, self._route, self._gate = transport, handle, route, gate
        self._span = Span(handle.start, handle.num_tokens, handle.source.blocks)
        self._reported_at = time.monotonic()
        self.layer_digest = self.digest = 0

    @property
    def layers(self) -> range:
        return self._route.layers

    def of(self, layer: int) -> list[Tensor]:
        """Keys and values of a layer, each [tokens, heads, width]. Raises Stopped."""
        if self._gate is not None and not self._gate.wait(layer):
            raise Stopped
        if self._transport.is_cancelled(self._handle.key):
            raise Stopped
        self._renew()
        pool = self._transport.pool
        rows = [pool.read(cache, self._span, self._route.heads) for cache in pool.caches(layer)]
        self.layer_digest = digest_of(rows)
        self.digest = chain(self.digest, self.layer_digest)
        return rows

    def _renew(self) -> None:
        now = time.monotonic()
        if now - self._reported_at > ALIVE_SECONDS:
            self._reported_at = now
            self._transport.report_alive(self._handle.key)


def digest_of(rows: Sequence[Tensor]) -> int:
    """CRC-32 of the bytes of contiguous tensors."""
    digest = 0
    for one in rows:
        digest = zlib.crc32(bytes_of(one), digest)
    return digest


def bytes_of(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = rows.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def chain(digest: int, layer_digest: int) -> int:
    """The digest of a piece with one more layer."""
    return zlib.crc32(layer_digest.to_bytes(4, "little"), digest)
