"""The shortcuts of the front's hot paths have the results of the long ways."""

from __future__ import annotations

import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from servers import ScriptedChannel, TestServer, running

from sageLLM.runtime.server import channel
from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.messages import Delta, Event, Step
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


@given(sizes=st.lists(st.integers(0, 300), max_size=6), cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_events_are_read_however_they_arrive(sizes: list[int], cuts: list[int]) -> None:
    events = [Step([Delta("a", 0, list(range(size)))]) for size in sizes]
    data = b"".join(map(channel.frame, map(msgspec.msgpack.encode, events)))
    found: list[tuple[Event, bool]] = []
    receiver = channel.Receiver(lambda event: found.append((event, receiver.has_next_event)), lambda: None)
    ends = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    for start, end in pairwise(ends):
        num_before = len(found)
        receiver.data_received(data[start:end])
        flags = [has_next_event for _, has_next_event in found[num_before:]]
        assert flags == [True] * (len(flags) - 1) + [False] * bool(flags)
    assert [event for event, _ in found] == events


STEPS = [[7], [8, 9], [60], [61, 62], [63], [5]]


def streamed(path: str, body: dict[str, Any], **settings: Any) -> tuple[str, list[str]]:
    """The text of a stream of STEPS, of which the second arrives together with the third, and its other events."""
    engine = ScriptedChannel()

    def play() -> None:
        assert engine.arrived.acquire(timeout=30)
        [name] = engine.submitted
        for number, ids in enumerate(STEPS):
            first = {"num_cached_tokens": 0, "queue_seconds": 0.0} if number == 0 else {}
            engine.has_next_event = number == 1
            reason = "length" if number == len(STEPS) - 1 else None
            engine.emit_tokens(name, ids, reason, **first)
            time.sleep(0.02)

    with running(lambda: engine, **settings) as server, ThreadPoolExecutor(1) as pool:
        texts, rest, playing = [], [], pool.submit(play)
        body = {"stream": True, "max_tokens": sum(map(len, STEPS)), **body}
        with server.http.stream("POST", path, json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                choice = event["choices"][0]
                text = choice.get("text", choice.get("delta", {}).get("content"))
                texts.append(text or "")
                if choice["finish_reason"] is not None:
                    rest.append(choice["finish_reason"])
        playing.result()
        return "".join(texts), rest


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [5]}),
        ("/v1/completions", {"prompt": [5], "stop": "no such text"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_streams_are_the_same_with_and_without_their_handler(path: str, body: dict[str, Any]) -> None:
    """With comments in quiet streams every piece goes through the handler."""
    text, ends = streamed(path, body)
    assert text and len(ends) == 1
    assert (text, ends) == streamed(path, body, sse_keep_alive_interval=60.0)


def test_a_failure_without_the_handler_ends_its_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedChannel()

    def begin() -> str:
        assert engine.arrived.acquire(timeout=30)
        [name] = engine.submitted
        engine.emit_tokens(name, [7], num_cached_tokens=0)
        return name

    with running(lambda: engine) as server, ThreadPoolExecutor(1) as pool:
        beginning, body = pool.submit(begin), {"prompt": [5], "max_tokens": 9, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert '"text":' in next(lines)
            with monkeypatch.context() as patch:
                patch.setattr(TextFrame, "__call__", lambda self, text: 1 // 0)
                engine.emit_tokens(beginning.result(), [8])
                assert '"code":500' in "".join(lines)
        assert engine.aborted[0].request_id == beginning.result()
        assert server.get("/readyz").status_code == 200


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
