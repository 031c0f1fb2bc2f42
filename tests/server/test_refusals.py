"""Refusals of a full queue once the head is read: the connection stays usable, and nothing else is skipped."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from servers import ScriptedChannel, TestServer, running

from sageLLM.runtime.server.http_client import Address

PATH = "/v1/completions"
BODY = b'{"prompt": [1], "max_tokens": 1}'


def request(*headers: str, body: bytes = BODY, path: str = PATH) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextmanager
def full_server(**settings: object) -> Iterator[tuple[TestServer, ScriptedChannel]]:
    """A server with a queue for one request, which is taken."""
    channel = ScriptedChannel()
    with running(lambda: channel, max_num_queued_reqs=1, **settings) as server, closing(connect(server)) as sock:
        keys = server.service.settings.api_key
        sock.sendall(request(*(f"Authorization: Bearer {key}" for key in keys)))
        assert channel.arrived.acquire(timeout=30)
        yield server, channel


def connect(server: TestServer) -> socket.socket:
    address = Address.of(server.url)
    return socket.create_connection((address.host, address.port), timeout=30)


def responses(sock: socket.socket, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    """The next responses of a connection, with nothing behind them: status, headers, body."""
    data, found = b"", []
    while len(found) < count:
        data += sock.recv(65536)
        while match := re.match(rb"HTTP/1\.1 (\d+) [^\r]*\r\n(.*?)\r\n\r\n", data, re.DOTALL):
            headers = dict(line.split(": ", 1) for line in match[2].decode().split("\r\n"))
            end = match.end() + int(headers["content-length"])
            if len(data) < end:
                break
            found.append((int(match[1]), headers, data[match.end() : end]))
            data = data[end:]
    assert not data
    return found


def test_a_connection_stays_in_step_however_its_requests_arrive() -> None:
    large = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    livez = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with full_server() as (server, _), closing(connect(server)) as sock:
        for data, count in ((request(), 1), (request() * 3, 3), (request(body=large), 1), (b"\r\n" + request(), 1)):
            sock.sendall(data)
            for status, headers, body in responses(sock, count):
                assert (status, headers["retry-after"]) == (429, "1")
                assert json.loads(body)["error"]["code"] == 429 and len(headers["x-request-id"]) == 32
        for cut in (1, 20, len(request()) - len(BODY), len(request()) - 1):
            sock.sendall(request()[:cut])
            sock.sendall(request()[cut:] + livez)
            assert [status for status, *_ in responses(sock, 2)] == [429, 200]
        sock.sendall(request("X-Request-Id: mine", path="/v1/messages"))
        [(status, headers, body)] = responses(sock, 1)
        assert (status, headers["x-request-id"], json.loads(body)["type"]) == (429, "mine", "error")
        assert refusals(server, "requests") == 11
        assert f'http_requests_total{{handler="{PATH}",method="POST",status="4xx"}} 10.0' in server.get("/metrics").text


def test_a_refused_request_ends_its_connection_if_it_says_so_or_is_damaged() -> None:
    chunked = request("Transfer-Encoding: chunked").replace(b"Content-Length: %d\r\n" % len(BODY), b"")
    damaged = chunked.replace(BODY, b"x\r\n")
    with full_server() as (server, _):
        long = request().replace(b"Content-Length: ", b"Content-Length: " + b"9" * 5000)
        for data, expected in (
            (request("Connection: close"), 429),
            (request().replace(b"HTTP/1.1", b"HTTP/1.0"), 429),
            (damaged, 429),
            (long, 400),
        ):
            with closing(connect(server)) as sock:
                sock.sendall(data)
                assert [status for status, *_ in responses(sock, 1)] == [expected]
                assert sock.recv(1) == b""


def test_a_client_that_closes_reads_its_refusal_behind_a_large_body() -> None:
    """A socket that is closed while data arrives resets the connection, and the response may be lost."""
    with full_server() as (server, _), closing(connect(server)) as sock:
        sock.sendall(request("Connection: close", body=b" " * 20_000_000))
        assert [status for status, *_ in responses(sock, 1)] == [429]
        assert sock.recv(1) == b""


def test_the_rest_of_a_refused_request_must_arrive_in_time() -> None:
    with full_server(header_timeout=0.2) as (server, _), closing(connect(server)) as sock:
        sock.sendall(request()[:-1])
        assert [status for status, *_ in responses(sock, 1)] == [429]
        assert sock.recv(1) == b""


def refusals(server: TestServer, reason: str) -> int:
    found = re.findall(rf'admission_rejections_total{{.*reason="{reason}"}} (\d+)', server.get("/metrics").text)
    return int(found[0])


def test_a_wrong_key_comes_before_the_full_queue() -> None:
    with full_server(api_key=["right"]) as (server, _), closing(connect(server)) as sock:
        sock.sendall(request("Authorization: Bearer wrong") + request("Authorization: Bearer right"))
        assert [status for status, *_ in responses(sock, 2)] == [401, 429]
        for key, expected in (("wrong", 401), ("right", 429)):
            sock.sendall(request(f"Authorization: Bearer {key}"))
            assert responses(sock, 1)[0][0] == expected
        assert (refusals(server, "auth"), refusals(server, "requests")) == (2, 2)


def test_the_place_is_free_after_the_first_token() -> None:
    with full_server() as (server, channel), closing(connect(server)) as sock:
        sock.sendall(request())
        assert responses(sock, 1)[0][0] == 429
        [first] = channel.submitted
        channel.emit_tokens(first, [7], "length")
        while server.service.admission.is_full:
            time.sleep(0.001)
        sock.sendall(request())
        while len(channel.submitted) == 1:
            time.sleep(0.001)
        second = next(name for name in channel.submitted if name != first)
        channel.emit_tokens(second, [7], "length")
        assert responses(sock, 1)[0][0] == 200


def test_a_draining_server_says_so() -> None:
    with full_server() as (server, _), closing(connect(server)) as sock:
        server.service.admission.is_draining = True
        sock.sendall(request())
        assert responses(sock, 1)[0][0] == 503
        server.service.admission.is_draining = False
