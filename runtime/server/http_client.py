"""A small HTTP client on asyncio for measurements and the terminal chat: JSON requests, event streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

MAX_LINE = 16 * 2**20


class HttpError(Exception):
    """A response other than 200, or an error object in a stream."""


class Address(NamedTuple):
    """Host, port and prefix of a server's URL, such as http://127.0.0.1:8000."""

    host: str
    port: int
    prefix: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises ValueError for another scheme than http and for a URL without a host."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
        return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/"))


class Connection:
    """Opens a connection for each request, and closes it with the response."""

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        self._address, self._headers = address, dict(headers or {})

    async def json(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of a response. Raises HttpError and OSError."""
        data = b"".join([chunk async for chunk in self._chunks(method, path, body)])
        return msgspec.json.decode(data)

    async def events(self, path: str, body: object) -> AsyncIterator[dict[str, Any]]:
        """The objects of an event stream up to [DONE]. Raises HttpError and OSError, also for a stream that was cut."""
        rest = b""
        async for chunk in self._chunks("POST", path, body):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]":
                    return
                value = msgspec.json.decode(line[6:])
                if "error" in value:
                    raise HttpError(value["error"]["message"])
                yield value
        raise HttpError("the stream ended without [DONE]")

    async def _chunks(self, method: str, path: str, body: object) -> AsyncIterator[bytes]:
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port, limit=MAX_LINE)
        try:
            data = b"" if body is None else msgspec.json.encode(body)
            fields = {"host": self._address.host, "content-length": str(len(data)), "connection": "close"}
            if data:
                fields["content-type"] = "application/json"  # other servers refuse a body without it
            head = [f"{method} {self._address.prefix}{path} HTTP/1.1"]
            head += [f"{name}: {value}" for name, value in {**fields, **self._headers}.items()]
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
            status = int((await reader.readline()).split()[1])
            is_chunked = False
            while (line := await reader.readline()).strip():
                is_chunked |= line.lower().startswith(b"transfer-encoding: chunked")
            if status != 200:
                raise HttpError(await _message(status, self._body(reader, is_chunked=is_chunked)))
            async for chunk in self._body(reader, is_chunked=is_chunked):
                yield chunk
        except (IndexError, ValueError, asyncio.IncompleteReadError) as error:
            raise HttpError(f"the connection was cut: {error}") from None
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    @staticmethod
    async def _body(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
        if not is_chunked:
            yield await reader.read()
            return
        while (size := int((await reader.readline()).strip(), 16)) > 0:
            yield await reader.readexactly(size)
            await reader.readline()


async def _message(status: int, body: AsyncIterator[bytes]) -> str:
    data = b"".join([chunk async for chunk in body])
    try:
        return f"HTTP {status}: {msgspec.json.decode(data)['error']['message']}"
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"HTTP {status}: {data[:200]!r}"
