"""Transport over TCP: each rank listens, and source ranks connect to it with the engine's key.

A receiver writes a layer only if the handle is signed, of this epoch and not cancelled, and the layer has the size of
the piece. Otherwise it closes the connection, which fails the pieces on it and nothing else.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection

import torch

from sageLLM.runtime.transport.base import LayerGate, LayerGroups, Place, QueuedTransport
from sageLLM.runtime.transport.channel import AuthenticationError, challenge
from sageLLM.runtime.transport.frames import (
    Begin,
    End,
    FrameError,
    Layers,
    Reply,
    receive_header,
    send_header,
)
from sageLLM.runtime.transport.handle import Handle, HandleError, PieceKey, SignedHandle, open_handle
from sageLLM.runtime.transport.jobs import BACKGROUND, yield_to_others
from sageLLM.runtime.transport.link import SECONDS, Answers, Link
from sageLLM.runtime.transport.rows import Rows, Span
from sageLLM.runtime.transport.shards import Route
from sageLLM.runtime.transport.sockets import Connections, discard, limit_waits, shut

LOOPBACK = "127.0.0.1"
STALL_SECONDS = 1.0
"""The time for the rest of a frame of a cancelled piece, after which its connection is closed."""
FRAME_BYTES = 2**21
"""Layers that wait for no step share a frame of up to so many bytes. Between two frames a piece renews its lease."""
MAX_DIGESTS = 4096
"""Digests of pieces that wait for `check`; a piece is that old only if its check is lost."""


class TcpTransport(QueuedTransport):
    """Sends pieces to the addresses "HOST:PORT" of the target's ranks, and receives those for this rank."""

    def __init__(self, place: Place, host: str = LOOPBACK, nice: int = BACKGROUND) -> None:
        self._links: dict[str, Link] = {}
        self._sending: tuple[PieceKey, Link] | None = None
        self._answers = Answers(lambda reason: None)
        self._digests: dict[int, int] = {}
        self._used: list[Link] = []
        self._unanswered: dict[PieceKey, list[Link]] = {}
        self._receiver = Receiver(self, place, host, nice)
        super().__init__(place, nice)

    @property
    def address(self) -> str:
        """The address of this rank."""
        return self._receiver.address

    def close(self) -> None:
        self._receiver.close()
        if (sending := self._sending) is not None:
            sending[1].stop()
        super().close()
        for link in self._links.values():
            link.close()

    def _push(self, handle: Handle, signed: SignedHandle, address: Sequence[str], gate: LayerGate | None) -> None:
        self._digests, self._used = {}, []
        self._answers = Answers(partial(self._answered, handle.key, self._digests))
        super()._push(handle, signed, address, gate)

    def _send(self, handle: Handle, signed: SignedHandle, route: Route, address: str, layers: LayerGroups) -> int:
        link = self._link(address, handle.key)
        self._sending = handle.key, link
        self._used.append(link)
        digest, span = 0, self.pool.span(handle.start, handle.num_tokens, handle.source.blocks)
        try:
            link.expect(self._answers)
            send_header(link.stream, Begin(signed, self._place.rank))
            for some in layers:
                rows = [one for layer in some for one in self.pool.rows(layer, span, route.heads)]
                send_header(link.stream, Layers(some[0], len(some)), sum(one.num_bytes for one in rows))
                digest = self.copier.send(link.stream, rows, digest)
            send_header(link.stream, End())
            link.end_piece()
        except BaseException:
            link.drop()  # the receiver must not take what follows for the rest of this piece
            raise
        finally:
            self._sending = None
        return digest

    def _sent(self, key: PieceKey, digests: dict[int, int]) -> None:
        self._digests.update(digests)
        self._unanswered[key] = self._used
        self._answers.take()

    def _answered(self, key: PieceKey, digests: dict[int, int], reason: str | None) -> None:
        self._unanswered.pop(key, None)
        if self.is_cancelled(key):
            return  # `cancel` reports it
        if reason is None:
            self._report("pushed", key, digests=digests)
        else:
            self._report("failed", key, reason=reason)

    def _push_progress(self, key: PieceKey) -> object:
        """Of its connections if the piece has been sent; otherwise of the pieces before it, and of what is sent now."""
        if (links := self._unanswered.get(key)) is not None:
            return sum(link.progress for link in links)
        return self._num_sent, sum(link.progress for link in list(self._used))

    def _layers_at_once(self, handle: Handle, route: Route) -> int:
        span = self.pool.span(handle.start, handle.num_tokens, handle.source.blocks)
        layer_bytes = sum(rows.num_bytes for rows in self.pool.rows(route.layers[0], span, route.heads))
        return max(1, FRAME_BYTES // max(1, layer_bytes))

    def _digest_of(self, route: Route, handle: Handle) -> int | None:
        return self._receiver.take_digest(handle.key, route.source)

    def _link(self, address: str, key: PieceKey) -> Link:
        link = self._links.get(address)
        if link is not None and link.is_open:
            return link
        for ended in [one for one, other in self._links.items() if not other.is_open]:
            self._links.pop(ended).drop()
        self._links[address] = link = Link(address, self._place.key, lambda: not self.is_cancelled(key))
        return link

    def _interrupt(self, key: PieceKey) -> None:
        sending = self._sending
        if sending is not None and sending[0] == key:
            sending[1].stop()
        for link in self._unanswered.get(key, ()):
            if link.is_stalled:
                link.stop()

    def _settle(self, key: PieceKey) -> None:
        self._receiver.settle(key)
        super()._settle(key)


class Receiver:
    """Accepts connections of other ranks, and writes what they send to the pool of this one.

    What arrives goes to its blocks without another copy, and its digest is computed while it is in the caches. The
    blocks are reserved for the piece until it ends, and `check` decides whether they are used.
    """

    def __init__(self, transport: TcpTransport, place: Place, host: str, nice: int) -> None:
        self._transport, self._place, self._nice = transport, place, nice
        self._writers: list[tuple[PieceKey, socket.socket]] = []
        self._changed = threading.Condition()
        self._digests: OrderedDict[tuple[PieceKey, int], int] = OrderedDict()
        listener = socket.create_server((host, 0))
        self.address = "{}:{}".format(*listener.getsockname()[:2])
        self._connections = Connections(listener, "sagellm-kv-receiver", self._serve)

    def close(self) -> None:
        self._connections.close()

    def settle(self, key: PieceKey) -> None:
        """Waits until nothing writes a cancelled piece; closes connections whose other end does not go on with it."""
        with self._changed:
            if self._changed.wait_for(lambda: not self._writers_of(key), STALL_SECONDS):
                return
            for stream in self._writers_of(key):
                shut(stream)
            self._changed.wait_for(lambda: not self._writers_of(key))

    def _writers_of(self, key: PieceKey) -> list[socket.socket]:
        return [stream for found, stream in self._writers if found == key]

    def take_digest(self, key: PieceKey, source_rank: int) -> int | None:
        """The digest of what a rank has sent of a piece, once; None if that is not complete."""
        with self._changed:
            return self._digests.pop((key, source_rank), None)

    def _keep_digest(self, key: PieceKey, source_rank: int, digest: int) -> None:
        with self._changed:
            self._digests[key, source_rank] = digest
            while len(self._digests) > MAX_DIGESTS:
                self._digests.popitem(last=False)

    @contextmanager
    def _writing(self, key: PieceKey, stream: socket.socket) -> Iterator[bool]:
        """Whether the next layers may be written, which is awaited by `settle` then."""
        with self._changed:
            is_wanted = not self._transport.is_cancelled(key)
            if is_wanted:
                self._writers.append((key, stream))
        try:
            yield is_wanted
        finally:
            if is_wanted:
                with self._changed:
                    self._writers.remove((key, stream))
                    self._changed.notify_all()

    @torch.inference_mode()
    def _serve(self, stream: socket.socket) -> None:
        yield_to_others(self._nice)
        try:
            limit_waits(stream, SECONDS)
            with Connection(os.dup(stream.fileno())) as connection:
                challenge(connection, self._place.key)
            while True:
                self._receive_piece(stream)
        except (AuthenticationError, FrameError, HandleError, OSError):
            pass  # the other end reports its piece as failed

    def _receive_piece(self, stream: socket.socket) -> None:
        begin, _ = receive_header(stream)
        if not isinstance(begin, Begin):
            raise FrameError("a piece must begin with its handle")
        handle = self._accepted(begin.handle)
        route = self._route(handle, begin.source_rank)
        span = self._transport.pool.span(handle.start, handle.num_tokens, handle.target.blocks)
        digest: int | None = 0
        left = route.layers
        while left:
            some, rows = self._next_layers(stream, left, span, route)
            with self._writing(handle.key, stream) as is_wanted:
                if is_wanted and digest is not None:
                    digest = self._transport.copier.receive(stream, rows, digest)
                else:  # what comes after a cancelled piece is received
                    digest = None
                    discard(stream, sum(one.num_bytes for one in rows))
            left = left[some:]
        end, _ = receive_header(stream)
        if not isinstance(end, End):
            raise FrameError("expected the end of the piece")
        if digest is None:
            send_header(stream, Reply("the piece was cancelled"))
            return
        self._keep_digest(handle.key, begin.source_rank, digest)
        send_header(stream, Reply())

    def _accepted(self, signed: SignedHandle) -> Handle:
        handle = open_handle(signed, self._place.key)
        end = handle.target
        if (end.worker, end.epoch) != (self._place.worker, self._place.epoch):
            raise HandleError("the handle is for another worker or epoch")
        return handle

    def _route(self, handle: Handle, source_rank: int) -> Route:
        for route in self._place.routes(handle):
            if (route.source, route.target) == (source_rank, self._place.rank):
                return route
        raise FrameError(f"rank {source_rank} has nothing to send to this rank")

    def _next_layers(self, stream: socket.socket, left: range, span: Span, route: Route) -> tuple[int, list[Rows]]:
        """How many of the layers that are left come now, and the rows to write them to."""
        header, num_bytes = receive_header(stream)
        if not isinstance(header, Layers) or header.first != left.start or not 0 < header.count <= len(left):
            raise FrameError(f"expected layers from {left.start} to {left.stop - 1}")
        layers = left[: header.count]
        rows = [one for layer in layers for one in self._transport.pool.rows(layer, span, route.heads)]
        if num_bytes != (wanted := sum(one.num_bytes for one in rows)):
            raise FrameError(f"{header.count} layers must have {wanted} bytes, got {num_bytes}")
        return header.count, rows
