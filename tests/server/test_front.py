"""The shortcuts of the front's hot paths have the results of the long ways."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from servers import TestServer

from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.http_protocol import send_now
from sageLLM.runtime.server.plain_metrics import PlainCounter, PlainHistogram
from sageLLM.runtime.server.streams import PLACE, TextFrame, frame


@given(text=st.text())
def test_a_text_frame_is_the_frame_of_the_chunk(text: str) -> None:
    def chunk(text: str) -> dict[str, Any]:
        return {"id": PLACE, "choices": [{"index": 0, "text": text, "finish_reason": None}]}

    text = text.encode("utf-8", "replace").decode()
    assert TextFrame(chunk(PLACE))(text) == frame(chunk(text))


@given(values=st.lists(st.floats(0, 100)))
def test_plain_metrics_print_what_prometheus_clients_do(values: list[float]) -> None:
    """But for the time of a histogram's creation, which boards do not read."""
    labels, bounds = {"model_name": "a", "status": "2xx"}, (0.01, 1, 10)
    plain, usual = CollectorRegistry(), CollectorRegistry()
    count = PlainCounter("a:b", "Help.", list(labels), plain).labels(labels)
    gaps = PlainHistogram("a:c_seconds", "Help.", list(labels), plain, bounds).labels(labels)
    count_there = Counter("a:b", "Help.", list(labels), registry=usual).labels(**labels)
    gaps_there = Histogram("a:c_seconds", "Help.", list(labels), registry=usual, buckets=bounds).labels(**labels)
    for value in values:
        for counter in (count, count_there):
            counter.inc()
        for histogram in (gaps, gaps_there):
            histogram.observe(value)

    def lines(registry: CollectorRegistry) -> list[str]:
        return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]

    assert lines(plain) == lines(usual)


class Transport(asyncio.Transport):
    """Collects what goes through the transport; `waiting` is the size of its buffer."""

    def __init__(self, sock: socket.socket, waiting: int = 0) -> None:
        super().__init__({"socket": sock})
        self.waiting, self.written = waiting, b""

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def write(self, data: Any) -> None:
        self.written += data


def test_what_a_socket_does_not_take_goes_through_the_transport() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        small, large = Transport(ours), Transport(ours)
        send_now(small, b"abc")
        assert (theirs.recv(10), small.written) == (b"abc", b"")
        data = bytes(range(256)) * 2**16
        send_now(large, data)
        send_now(large, b"more")  # the buffer of the socket is full
        assert 0 < len(large.written) < len(data) and large.written.endswith(data[-9:] + b"more")
        behind = Transport(ours, waiting=1)
        send_now(behind, b"later")
        assert behind.written == b"later"
    closed = Transport(ours)
    send_now(closed, b"abc")
    assert closed.written == b"abc"


def test_an_answered_request_is_freed_without_the_garbage_collector(server: TestServer) -> None:
    """A collection of many requests would stop the front for tens of milliseconds."""
    gc.collect()
    gc.disable()
    try:
        for is_streamed in (False, True):
            options = {"max_tokens": 2, "stream": is_streamed}
            chat = {"messages": [{"role": "user", "content": "a"}]}
            assert server.post("/v1/completions", {"prompt": "a", **options}).status_code == 200
            assert server.post("/v1/chat/completions", {**chat, **options}).status_code == 200
        deadline = time.monotonic() + 10
        while any(isinstance(one, Exchange) for one in gc.get_objects()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        gc.enable()
