"""Limits of connections and bodies, API keys, CORS."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import cast

import pytest
from servers import ScriptedChannel, TestServer, running

from sageLLM.runtime.server.errors import ApiError
from sageLLM.runtime.server.exchange import Buffers, Exchange

SETTINGS = {
    "api_key": ["first", "second"],
    "allowed_origins": ["https://here.example"],
    "max_body_size": 1000,
    "max_header_size": 2000,
    "max_header_count": 20,
}


@pytest.fixture(scope="module")
def server() -> Iterator[TestServer]:
    with running(ScriptedChannel, **SETTINGS) as found:
        yield found


def exchange(server: TestServer, *parts: bytes) -> bytes:
    """What a raw connection returns until the server closes it."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        for part in parts:
            raw.sendall(part)
        data = b""
        while chunk := raw.recv(65536):
            data += chunk
    return data


def test_api_keys(server: TestServer) -> None:
    def status(key: str | None, path: str = "/v1/models") -> int:
        return server.get(path, headers={} if key is None else {"Authorization": key}).status_code

    assert [status(f"Bearer {key}") for key in SETTINGS["api_key"]] == [200, 200]
    assert [status(key) for key in (None, "Bearer", "Bearer third", "Basic first", "first")] == [401] * 5
    assert status(None, "/v1/other") == 401, "unknown routes are not listed to strangers"
    assert [status(None, path) for path in ("/livez", "/readyz", "/metrics", "/version")] == [200] * 4
    refused = server.get("/v1/models")
    assert refused.json()["error"]["type"] == "AuthenticationError" and refused.headers["www-authenticate"] == "Bearer"


def test_roles_are_for_administrators(server: TestServer) -> None:
    """The keys of users do not change them, and without a key for it nobody does."""
    refused = server.post("/v1/workers/0/role", {"role": "decode"}, headers={"Authorization": "Bearer first"})
    assert refused.status_code == 403 and "--admin-api-key" in refused.json()["error"]["message"]


def test_cors_only_for_allowed_origins(server: TestServer) -> None:
    def origin(name: str) -> str | None:
        return server.get("/version", headers={"Origin": name}).headers.get("access-control-allow-origin")

    assert origin("https://here.example") == "https://here.example" and origin("https://there.example") is None


def test_bodies_that_are_too_large(server: TestServer) -> None:
    headers = {"Authorization": "Bearer first"}
    declared = server.http.post("/v1/completions", content=b"x" * 1001, headers=headers)
    chunked = server.http.post("/v1/completions", content=iter([b"x" * 600, b"x" * 600]), headers=headers)
    assert [declared.status_code, chunked.status_code] == [413, 413]
    assert declared.json()["error"]["message"] == "the body must have at most 1000 bytes"


def test_bodies_of_many_requests_have_a_bound() -> None:
    buffers = Buffers(100)
    first, second = (cast(Exchange, object()) for _ in range(2))
    buffers.hold(first, 500)
    with pytest.raises(ApiError, match="too many large bodies"):
        buffers.hold(second, 1)
    buffers.release(second)
    buffers.hold(first, 60)
    buffers.hold(second, 40)


def test_slow_headers() -> None:
    with running(ScriptedChannel, header_timeout=0.2) as server:
        assert exchange(server, b"GET /livez HTTP/1.1\r\nhost: a\r\n") == b""
        assert exchange(server) == b""


def test_slow_bodies() -> None:
    with running(ScriptedChannel, body_timeout=0.2) as server:
        head = b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{"
        answer = exchange(server, head)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"RequestTimeoutError" in answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 3000 + b"\r\nconnection: close\r\n\r\n", 431),
        (b"GET /livez HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 9000, 431),
        (b"GET /livez HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 30 + b"connection: close\r\n\r\n", 431),
        (b"not http\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
    ],
)
def test_bad_heads(server: TestServer, data: bytes, status: int) -> None:
    answer = exchange(server, data)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert b'{"error":{"message":' in answer


def test_connections_of_many_requests_are_kept(server: TestServer) -> None:
    assert {server.get("/livez").status_code for _ in range(50)} == {200}
