"""Transport over TCP: each rank listens, and source ranks connect to it with the engine's key.

A receiver writes a layer only if the handle is signed, of this epoch and not cancelled, and the digest of the layer is
right. Otherwise it closes the connection, which fails the pieces on it and nothing else.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from sageLLM.runtime.transport.base import LayerRows, Place, QueuedTransport, bytes_of, digest_of
from sageLLM.runtime.transport.channel import AuthenticationError, answer_challenge, challenge
from sageLLM.runtime.transport.frames import (
    Begin,
    End,
    FrameError,
    Layer,
    Reply,
    receive_header,
    receive_into,
    send_frame,
)
from sageLLM.runtime.transport.handle import Handle, HandleError, PieceKey, SignedHandle, open_handle
from sageLLM.runtime.transport.jobs import BACKGROUND, yield_to_others
from sageLLM.runtime.transport.shards import Route, Span

SECONDS = 60.0
"""A connection without progress for so long is closed."""
LOOPBACK = "127.0.0.1"


class TcpTransport(QueuedTransport):
    """Sends pieces to the addresses "HOST:PORT" of the target's ranks, and receives those for this rank."""

    def __init__(self, place: Place, host: str = LOOPBACK) -> None:
        self._streams: dict[str, socket.socket] = {}
        self._sending: tuple[PieceKey, socket.socket] | None = None
        self._receiver = Receiver(self, place, host)
        super().__init__(place)

    @property
    def address(self) -> str:
        """The address of this rank."""
        return self._receiver.address

    def close(self) -> None:
        self._receiver.close()
        if self._sending is not None:
            _shut(self._sending[1])
        super().close()
        for stream in self._streams.values():
            stream.close()

    def _send(self, handle: Handle, signed: SignedHandle, route: Route, address: str, rows: LayerRows) -> None:
        stream = self._connect(address)
        self._sending = handle.key, stream
        try:
            send_frame(stream, Begin(signed, self._place.rank))
            for layer in rows.layers:
                found = rows.of(layer)
                send_frame(stream, Layer(layer, rows.layer_digest), [bytes_of(one) for one in found])
            send_frame(stream, End())
            reply, _ = receive_header(stream)
        except BaseException:
            stream.close()  # the receiver must not take what follows for the rest of this piece
            del self._streams[address]
            raise
        finally:
            self._sending = None
        if not isinstance(reply, Reply) or reply.reason is not None:
            raise OSError(reply.reason if isinstance(reply, Reply) else "unexpected answer")

    def _connect(self, address: str) -> socket.socket:
        if (stream := self._streams.get(address)) is not None:
            return stream
        host, _, port = address.rpartition(":")
        stream = socket.create_connection((host, int(port)), timeout=SECONDS)
        _tune(stream)
        try:
            with Connection(os.dup(stream.fileno())) as connection:
                answer_challenge(connection, self._place.key)
        except BaseException:
            stream.close()
            raise
        self._streams[address] = stream
        return stream

    def _interrupt(self, key: PieceKey) -> None:
        sending = self._sending
        if sending is not None and sending[0] == key:
            _shut(sending[1])

    def _settle(self, key: PieceKey) -> None:
        with self._receiver.writing:  # a layer that is being written is complete
            super()._settle(key)


class Receiver:
    """Accepts connections of other ranks, and writes what they send to the pool of this one."""

    def __init__(self, transport: TcpTransport, place: Place, host: str) -> None:
        self._transport, self._place = transport, place
        self.writing = threading.Lock()
        self._listener = socket.create_server((host, 0))
        self.address = "{}:{}".format(*self._listener.getsockname()[:2])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="sagellm-kv-listener", daemon=True).start()

    def close(self) -> None:
        _shut(self._listener)
        self._listener.close()
        for stream in list(self._open):
            _shut(stream)

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(stream,), name="sagellm-kv-receiver", daemon=True).start()

    @torch.inference_mode()
    def _serve(self, stream: socket.socket) -> None:
        self._open.add(stream)
        yield_to_others(BACKGROUND)
        try:
            _tune(stream)
            with Connection(os.dup(stream.fileno())) as connection:
                challenge(connection, self._place.key)
            while True:
                self._receive_piece(stream)
        except (AuthenticationError, FrameError, HandleError, OSError):
            pass  # the other end reports its piece as failed
        finally:
            self._open.discard(stream)
            stream.close()

    def _receive_piece(self, stream: socket.socket) -> None:
        begin, _ = receive_header(stream)
        if not isinstance(begin, Begin):
            raise FrameError("a piece must begin with its handle")
        handle = self._accepted(begin.handle)
        span = Span(handle.start, handle.num_tokens, handle.target.blocks)
        for layer in self._route(handle, begin.source_rank).layers:
            header, num_bytes = receive_header(stream)
            if not isinstance(header, Layer) or header.layer != layer:
                raise FrameError(f"expected layer {layer}")
            self._receive_layer(stream, header, num_bytes, handle, span, self._route(handle, begin.source_rank))
        end, _ = receive_header(stream)
        if not isinstance(end, End):
            raise FrameError("expected the end of the piece")
        send_frame(stream, Reply())

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

    def _receive_layer(
        self, stream: socket.socket, header: Layer, num_bytes: int, handle: Handle, span: Span, route: Route
    ) -> None:
        pool = self._transport.pool
        caches = list(pool.caches(header.layer))
        rows = [_empty_rows(cache, span.num_tokens, len(route.heads)) for cache in caches]
        if num_bytes != sum(one.nbytes for one in rows):
            raise FrameError(f"layer {header.layer} must have {sum(one.nbytes for one in rows)} bytes, got {num_bytes}")
        for one in rows:
            receive_into(stream, bytes_of(one))
        if digest_of(rows) != header.digest:
            raise FrameError(f"the digest of layer {header.layer} differs")
        with self.writing:
            if self._transport.is_cancelled(handle.key):
                raise FrameError("the piece was cancelled")
            for cache, one in zip(caches, rows, strict=True):
                pool.write(cache, span, route.heads, one)


def _empty_rows(cache: Tensor, num_tokens: int, num_heads: int) -> Tensor:
    return torch.empty((num_tokens, num_heads, cache.shape[3]), dtype=cache.dtype)


def _tune(stream: socket.socket) -> None:
    stream.settimeout(SECONDS)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _shut(stream: socket.socket) -> None:
    with suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)
