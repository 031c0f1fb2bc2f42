"""Streams of a GPU for a plan: each call runs on the stream of its node, and events keep the planned waits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.passes.events import WAITS
from sageLLM.runtime.executor.native.streams import ensure_events, number_streams


class StreamApi(Protocol):
    """Makes and selects the streams of a device."""

    def new_stream(self) -> Any: ...

    def new_event(self) -> Any: ...

    def current_stream(self) -> Any: ...

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which calls go to the stream."""


class DeviceStreams:
    """The streams and events of one plan. Stream 0 is the one that is current when a step starts.

    The other streams begin with an event of it, and it waits for their ends (`fork` and `join`). So a step can be
    captured in a CUDA graph, with all its streams, and memory of a stream is free for any stream after the step.
    """

    def __init__(self, order: Sequence[ExecutionNode], api: StreamApi) -> None:
        """Raises ValueError for a graph of several devices."""
        self._api = api
        self.stream_of = number_streams(order)
        self._waits = {node.node_id: tuple(node.metadata.get(WAITS, ())) for node in order}
        awaited = {name for names in self._waits.values() for name in names}
        self._events = {name: api.new_event() for name in sorted(awaited)}
        self._sides = {number: api.new_stream() for number in sorted(set(self.stream_of.values()) - {0})}
        self._main: Any = None

    def fork(self) -> None:
        self._main = self._api.current_stream()
        for side in self._sides.values():
            side.wait_stream(self._main)

    def begin(self, node_id: str) -> AbstractContextManager[Any]:
        """Lets the stream of a node wait for its events; the context has that stream as the current one."""
        stream = self._stream(node_id)
        for name in self._waits[node_id]:
            stream.wait_event(self._events[name])
        return self._api.use(stream)

    def end(self, node_id: str) -> None:
        """Records the event of a node, if a node of another stream waits for it."""
        if node_id in self._events:
            self._events[node_id].record(self._stream(node_id))

    def join(self) -> None:
        for side in self._sides.values():
            self._main.wait_stream(side)

    def _stream(self, node_id: str) -> Any:
        number = self.stream_of[node_id]
        return self._sides[number] if number else self._main


def make_streams(graph: ExecutionGraph, order: Sequence[ExecutionNode], api: StreamApi | None) -> DeviceStreams | None:
    """The streams of a graph, with its events; None if it has one stream, or without a device that has streams."""
    if api is None or len({(node.device_id, node.stream_id) for node in order}) < 2:
        return None
    ensure_events(graph)
    return DeviceStreams(order, api)
