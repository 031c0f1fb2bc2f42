"""HTTP/1.1 connections: uvicorn's protocol with limits on heads, and refusals before a request has a task."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sageLLM.runtime.server.errors import ApiError, encode_response
from sageLLM.runtime.server.exchange import Scope
from sageLLM.runtime.server.gate import Gate


def protocol_of(gate: Gate) -> type[HttpToolsProtocol]:
    """The class that uvicorn calls without further arguments."""

    class BoundProtocol(LimitedProtocol):
        _gate = gate

    return BoundProtocol


class ChunkWriter:
    """Writes chunks of a response that has started, as `cycle.send` does, without its tasks and messages."""

    __slots__ = ("_cycle", "_transport")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._transport = cycle, cycle.transport

    @property
    def is_ready(self) -> bool:
        """Whether a chunk can be written: the response is chunked and open, and the client takes its data."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and not (
            cycle.flow.write_paused or cycle.disconnected or cycle.response_complete
        )

    def write(self, data: bytes) -> None:
        """Writes a chunk; without data there is none, as an empty chunk would end the response."""
        if data:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class LimitedProtocol(HttpToolsProtocol):
    """A connection with a deadline for the head of each request, and a bound on the bytes of a head or trailer.

    The parser collects a header until it is complete, so bytes are counted from one event to the next.
    """

    _gate: Gate
    _deadline: asyncio.TimerHandle | None = None
    _num_collected = 0
    _is_in_head = True
    _is_refused = False
    """Whether the request that is being read has its response; the rest of it is skipped."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_collected += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_collected > self._gate.settings.max_header_size:
            self._refuse(self._gate.too_long())
        elif self._deadline is None and (self._is_refused or (self._is_in_head and self._num_collected)):
            self._start_deadline()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    # --- events of the parser ---

    def on_header(self, name: bytes, value: bytes) -> None:
        """Headers of the head; those after a chunked body are ignored."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._num_collected = False, 0
        self._stop_deadline()
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts != 1 and self.parser.get_http_version() == "1.1":
            raise ValueError(f"expected one Host header, got {num_hosts}")
        if not self._refuse_early():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_collected = 0
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head, self._num_collected = True, 0
        if not self._is_refused:
            super().on_message_complete()
            return
        self._is_refused = False
        self._stop_deadline()
        if not self.parser.should_keep_alive():
            self.transport.close()  # not before: unread data would reset the connection, and the response with it
        self.on_response_complete()

    # --- responses without the application ---

    def _refuse_early(self) -> bool:
        """Answers a request that finds the queue full, unless the response to one before it is due."""
        if (self.cycle is not None and not self.cycle.response_complete) or self.parser.get_method() != b"POST":
            return False
        response = self._gate.refuse_early(cast(Scope, self.scope), self.url)
        if response is None:
            return False
        self._is_refused = True
        self.transport.write(response)
        return True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.scope["state"]["chunk_writer"] = ChunkWriter(cycle)
        super()._start_asgi_task(cycle, app)

    def _refuse(self, error: ApiError) -> None:
        """Answers a request that cannot be read, unless its response has begun; then closes the connection."""
        is_begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not is_begun and not self._is_refused:
            error.headers["Connection"] = "close"
            self.transport.write(encode_response(error))
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.close()

    # --- the deadline of a head ---

    def _start_deadline(self) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(self._gate.settings.header_timeout, self._is_late)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
