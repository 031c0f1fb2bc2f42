"""One HTTP request and its response, on the ASGI callables."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol

import msgspec

from sageLLM.runtime.server.errors import ApiError, encode_error

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ChunkWriter(Protocol):
    """Writes chunks of a response that has started, while it is ready."""

    @property
    def is_ready(self) -> bool: ...

    def write(self, data: bytes) -> None: ...


EVENTS = "text/event-stream; charset=utf-8"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
ANTHROPIC = "/v1/messages"


class ClientGoneError(Exception):
    """The client has closed its connection."""


class Buffers:
    """Bounds the bytes of bodies that are being received, over all requests."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held: dict[Exchange, int] = {}

    def hold(self, exchange: Exchange, num_bytes: int) -> None:
        """Raises ApiError 429 if that is too much; the only body that is being received always has room."""
        self._held[exchange] = num_bytes
        if len(self._held) > 1 and sum(self._held.values()) > self.max_bytes:
            raise ApiError(429, "too many large bodies are being received", headers={"Retry-After": "1"}, reason="body")

    def release(self, exchange: Exchange) -> None:
        self._held.pop(exchange, None)


class Exchange:
    """A request with its id and arrival time. After `start_stream` an error goes into the stream."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`writer` is None in an application without our protocol, such as one of a test."""
        self.scope, self._receive, self._send = scope, receive, send
        self.arrival: float = time.monotonic()
        self.request_id: str = scope["state"]["request_id"]
        self.is_streaming = False
        self.is_answered = False
        self.ignored: list[str] = []
        self._kind = error_kind(scope)
        self._watcher: asyncio.Task[None] | None = None
        self.writer: ChunkWriter | None = scope["state"].pop("chunk_writer", None)
        self._held: list[bytes] | None = None
        if scope.get("http_version") == "1.0":  # which has no chunks: a stream is sent as a whole
            self.writer, self._held = None, []

    def header(self, name: bytes) -> str | None:
        return header_of(self.scope, name)

    async def read_body(self, max_size: int, seconds: float, buffers: Buffers) -> bytes:
        """The body. Raises ApiError 413, 408 and 429, and ClientGoneError."""
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > max_size:
            raise self._too_large(max_size)
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    body += message.get("body", b"")
                    buffers.hold(self, len(body))
                    if len(body) > max_size:
                        raise self._too_large(max_size)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {seconds:g} s", headers={"Connection": "close"}, reason="body"
            ) from None
        finally:
            buffers.release(self)

    @staticmethod
    def _too_large(max_size: int) -> ApiError:
        message = f"the body must have at most {max_size} bytes"
        return ApiError(413, message, headers={"Connection": "close"}, reason="body")

    def watch_client(self, on_gone: Callable[[], None]) -> None:
        """Calls `on_gone` when the client closes its connection; to be called after the body is read."""

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            if not self.is_answered:
                on_gone()

        self._watcher = asyncio.create_task(watch())

    def close(self) -> None:
        """Forgets what refers to this object in turn, so that no request waits for the garbage collector."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    async def respond(
        self, status: int, body: bytes, kind: str = "application/json", headers: Mapping[str, str] | None = None
    ) -> None:
        await self._start(status, kind, [("content-length", str(len(body))), *(headers or {}).items()])
        await self._send({"type": "http.response.body", "body": body})
        self.is_answered = True

    async def respond_json(self, value: object) -> None:
        await self.respond(200, msgspec.json.encode(value))

    async def respond_error(self, error: ApiError) -> None:
        """The error as the response, or as the last object of a stream."""
        if self.is_answered:
            return
        if not self.is_streaming:
            await self.respond(error.status, encode_error(error, self._kind), headers=error.headers)
            return
        frame = b"data: " + encode_error(error, self._kind) + b"\n\n"
        await self.write(frame + DONE if self._kind is None else b"event: error\n" + frame)
        await self.end_stream()

    async def start_stream(self) -> None:
        if self._held is None:
            await self._start(200, EVENTS, STREAM_HEADERS.items())
        self.is_streaming = True

    async def write(self, data: bytes) -> None:
        """Sends a part of a stream: by the connection itself if it can take it now, else through the application."""
        if self.writer is not None and self.writer.is_ready:
            self.writer.write(data)
            return
        if self._held is not None:
            self._held.append(data)
            return
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self) -> None:
        if self._held is not None:
            await self.respond(200, b"".join(self._held), EVENTS, STREAM_HEADERS)
            return
        await self._send({"type": "http.response.body", "body": b""})
        self.is_answered = True

    async def _start(self, status: int, kind: str, headers: Iterable[tuple[str, str]]) -> None:
        pairs = [("content-type", kind), *headers]
        if self.ignored:
            pairs.append(("x-sagellm-ignored", ", ".join(self.ignored)))
        encoded = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in pairs]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})


def error_kind(scope: Scope) -> str | None:
    """The type of error objects: Anthropic's, and the events of its streams, have one."""
    return "error" if scope["path"].startswith(ANTHROPIC) else None


def header_of(scope: Scope, name: bytes) -> str | None:
    """The value of the first header of that name in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None
