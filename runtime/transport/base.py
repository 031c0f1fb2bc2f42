"""KV transports: copy pieces of KV from the pool of one worker to that of another one, layer by layer.

The engine makes a signed `Handle` for each piece. The source worker pushes it, and reports a digest for each rank of
the target; the target worker checks its pool against the digests, and reports whether they agree. Until then the engine
admits nothing to decode. Every handle that was pushed or checked gets exactly one report from this rank.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Literal, Protocol

import msgspec

from sageLLM.runtime.transport.handle import Handle, HandleError, PieceKey, SignedHandle, open_handle
from sageLLM.runtime.transport.jobs import BACKGROUND, JobThread
from sageLLM.runtime.transport.pulse import Progress, Pulse
from sageLLM.runtime.transport.rows import DigestName, make_copier
from sageLLM.runtime.transport.shards import Part, PoolShard, Route, routes_between

GATE_SECONDS = 0.1
"""The interval between two looks at whether a piece that waits for the computation of a layer is cancelled."""
MAX_CANCELLED = 4096
"""Cancelled pieces that are remembered; a handle is older than that many cancellations only if it is lost."""

LayerGroups = Iterator[Sequence[int]]
"""The layers of a piece in order, those together that are sent together."""
ReportKind = Literal["pushed", "received", "failed", "stopped", "alive"]


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Progress of one rank with a piece.

    - `pushed`: this rank's part has been written; `digests` maps ranks of the target to those of their parts.
    - `received`: the target's pool agrees with the digests of all source ranks.
    - `failed`: this rank has stopped, for the `reason`.
    - `stopped`: the answer to `cancel`; this rank does not read or write for the piece any more.
    - `alive`: the piece is at this rank, and it or one before it has made progress; this renews its lease.
    """

    kind: ReportKind
    key: PieceKey
    rank: int
    digests: dict[int, int] = {}
    reason: str = ""


class LayerGate(Protocol):
    """Says when the KV of a layer has been computed."""

    def wait(self, layer: int, seconds: float) -> bool | None:
        """True when the layer is complete, None if it is not within so many seconds, and false after a failure."""


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
    """This rank in a group of workers: the number of its worker, its rank, its epoch, and the parts of all workers.

    All ranks of the group have the same `key` and the same `digest`.
    """

    worker: int
    rank: int
    epoch: int
    parts: Sequence[Sequence[Part]]
    key: bytes
    digest: DigestName = "crc32"

    def routes(self, handle: Handle) -> list[Route]:
        return routes_between(self.parts[handle.source.worker], self.parts[handle.target.worker])


class Stopped(Exception):
    """The piece was cancelled, or the step that computes it has failed."""


class QueuedTransport(ABC):
    """A transport that pushes pieces one after another, and checks them one after another.

    Threads that work on what arrives have a low priority, the nice value `nice`, as the worker decodes meanwhile.
    """

    def __init__(self, place: Place, nice: int = BACKGROUND) -> None:
        self._place, self.copier = place, make_copier(place.digest)
        self._reports: SimpleQueue[Report | None] = SimpleQueue()  # None: look again
        self._pulse = Pulse()
        self._num_sent = self._num_checked = 0  # groups of layers, and layers
        self._pushing: PieceKey | None = None
        self._cancelled: OrderedDict[PieceKey, None] = OrderedDict()
        self._lock = Lock()
        self._pool: PoolShard | None = None
        self._is_closed = self._has_ended = False
        self._pushes = JobThread("sagellm-kv-push")
        self._checks = JobThread("sagellm-kv-check", nice)

    @property
    def pool(self) -> PoolShard:
        assert self._pool is not None, "register must be called first"
        return self._pool

    def register(self, pool: PoolShard) -> None:
        self._pool = pool

    def push(self, signed: SignedHandle, address: Sequence[str] = (), gate: LayerGate | None = None) -> None:
        if (handle := self._accept(signed, is_source=True)) is not None:
            self._hold(handle.key, partial(self._push_progress, handle.key))
            self._pushes.submit(lambda: self._push_unless_cancelled(handle, signed, address, gate))

    def check(self, signed: SignedHandle, digests: Sequence[int]) -> None:
        if (handle := self._accept(signed, is_source=False)) is not None:
            self._hold(handle.key, lambda: self._num_checked)
            self._checks.submit(lambda: self._check(handle, digests))

    def cancel(self, key: PieceKey) -> None:
        with self._lock:
            self._cancelled[key] = None
            while len(self._cancelled) > MAX_CANCELLED:
                self._cancelled.popitem(last=False)
            is_pushing = self._pushing == key
        self._interrupt(key)
        if not is_pushing:  # otherwise it settles when the thread that pushes has left it
            self._checks.submit(lambda: self._settle(key))

    def poll(self, seconds: float | None = 0.0) -> list[Report]:
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            found = self._take_reports(None if deadline is None else max(0.0, deadline - time.monotonic()))
            found += [Report("alive", key, self._place.rank) for key in self._pulse.take_moved()]
            if found or self._has_ended or (deadline is not None and time.monotonic() >= deadline):
                return found

    def _take_reports(self, seconds: float | None) -> list[Report]:
        """The reports that are there; waits up to `seconds`, or until the progress of pieces is due, for the first."""
        found: list[Report | None] = []
        with suppress(Empty):
            found.append(self._reports.get(seconds != 0, self._pulse.limit(seconds)))
            while True:
                found.append(self._reports.get_nowait())
        if self._has_ended:
            self._reports.put(None)  # for the next call
        return [report for report in found if report is not None]

    def close(self) -> None:
        self._is_closed = True
        self._pushes.close()
        self._checks.close()
        self._has_ended = True
        self._reports.put(None)

    # --- for subclasses ---

    @abstractmethod
    def _send(self, handle: Handle, signed: SignedHandle, route: Route, address: str, layers: LayerGroups) -> int:
        """Writes the layers to a rank of the target; returns their digest. Raises OSError."""

    def _sent(self, key: PieceKey, digests: dict[int, int]) -> None:
        """Reports a piece when its layers are there; by default they are when `_send` returns."""
        self._report("pushed", key, digests=digests)

    def _layers_at_once(self, handle: Handle, route: Route) -> int:
        """How many layers `_send` is given together, unless each has to be computed first."""
        return 1

    def _push_progress(self, key: PieceKey) -> object:
        """Another value whenever a piece that has been accepted for `push`, or one before it, has gone on."""
        return self._num_sent

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

    def _hold(self, key: PieceKey, progress: Progress) -> None:
        """Renews the lease of a piece from now on, as long as there is progress."""
        self._pulse.hold(key, progress)
        self._reports.put(None)  # `poll` may wait without a limit

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

    def _push_unless_cancelled(
        self, handle: Handle, signed: SignedHandle, address: Sequence[str], gate: LayerGate | None
    ) -> None:
        key = handle.key
        with self._lock:
            if key in self._cancelled:  # before its turn: it has settled
                self._pulse.release(key)
                return
            self._pushing = key
        try:
            self._push(handle, signed, address, gate)
        finally:
            with self._lock:
                self._pushing = None
                is_cancelled = key in self._cancelled
            if is_cancelled:
                self._checks.submit(lambda: self._settle(key))

    def _push(self, handle: Handle, signed: SignedHandle, address: Sequence[str], gate: LayerGate | None) -> None:
        digests = {}
        try:
            for route in self._place.routes(handle):
                if route.source == self._place.rank:
                    layers = self._computed_layers(handle, route, gate)
                    end = address[route.target] if address else ""
                    digests[route.target] = self._send(handle, signed, route, end, layers)
        except Stopped:
            return  # `cancel` reports it
        except Exception as error:
            if not self.is_cancelled(handle.key):  # otherwise, as above
                self._report("failed", handle.key, reason=f"{type(error).__name__}: {error}")
            return
        self._sent(handle.key, digests)

    def _computed_layers(self, handle: Handle, route: Route, gate: LayerGate | None) -> LayerGroups:
        """The layers of a route, each when it may be sent. Raises Stopped."""
        layers = route.layers
        at_once = self._layers_at_once(handle, route) if gate is None else 1
        for first in range(0, len(layers), at_once):
            is_open: bool | None = True
            while not self.is_cancelled(handle.key):
                self._num_sent += 1  # also while the step that computes the layer goes on
                if gate is None or (is_open := gate.wait(layers[first], GATE_SECONDS)) is not None:
                    break
            if self.is_cancelled(handle.key) or not is_open:
                raise Stopped
            yield layers[first : first + at_once]

    def _check(self, handle: Handle, digests: Sequence[int]) -> None:
        if self.is_cancelled(handle.key):
            self._pulse.release(handle.key)
            return
        self._num_checked += 1
        routes = [route for route in self._place.routes(handle) if route.target == self._place.rank]
        if [self._digest_of(route, handle) for route in routes] == list(digests):
            self._report("received", handle.key)
        else:
            self._report("failed", handle.key, reason="the digests of the KV differ")

    def _digest_of(self, route: Route, handle: Handle) -> int | None:
        """The digest of what a source rank has sent."""
        digest, span = 0, self.pool.span(handle.start, handle.num_tokens, handle.target.blocks)
        for layer in route.layers:
            self._num_checked += 1
            for rows in self.pool.rows(layer, span, route.heads):
                digest = self.copier.digest(rows, digest)
        return digest

    def _report(self, kind: ReportKind, key: PieceKey, digests: dict[int, int] | None = None, reason: str = "") -> None:
        self._pulse.release(key)
        self._reports.put(Report(kind, key, self._place.rank, digests or {}, reason))
