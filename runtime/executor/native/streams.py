"""Streams of a call list: the stream of each call, and the calls of other streams that it waits for."""

from collections.abc import Iterable, Sequence

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import lane
from sageLLM.runtime.core.passes.check import find_lost_waits
from sageLLM.runtime.core.passes.events import WAITS, plan_events

MAX_STREAMS = 16
"""The number of streams of runner.cpp."""


def number_streams(order: Iterable[ExecutionNode]) -> dict[str, int]:
    """The stream of each node, numbered from 0 in the order of the graph's stream ids.

    Raises ValueError for nodes of several devices: a plan runs on one.
    """
    lanes = {node.node_id: lane(node) for node in order}
    used = sorted(set(lanes.values()))
    if len({device for device, _ in used}) > 1:
        raise ValueError(f"a plan runs on one device, got {len({device for device, _ in used})}; split the graph first")
    if len(used) > MAX_STREAMS:
        raise ValueError(f"a plan must have at most {MAX_STREAMS} streams, got {len(used)}")
    number = {one: i for i, one in enumerate(used)}
    return {node_id: number[one] for node_id, one in lanes.items()}


def ensure_events(graph: ExecutionGraph) -> None:
    """Plans the events of a graph with several streams, unless a pass has done so."""
    if len({lane(node) for node in graph.nodes.values()}) < 2:
        return
    if not any(WAITS in node.metadata for node in graph.nodes.values()):
        plan_events(graph)
    lost = next(find_lost_waits(graph), None)
    assert lost is None, f"{graph.graph_id}: {lost}"


class CallStreams:
    """Turns the waits of nodes into waits of calls.

    A node may have several calls, of which the first waits and the last is its event. A node without a call (a view)
    ends when the call before it in its stream does and its own waits are met, and passes its waits to the next call of
    the stream. A call in Python runs when all calls before it are done, and later ones start after it.
    """

    def __init__(self, order: Sequence[ExecutionNode]) -> None:
        self._stream_of_node = number_streams(order)
        self.stream_of: list[int] = []  # by call
        self._events: dict[str, tuple[int, ...]] = {}  # the calls that are done when a node is
        self._last: dict[int, int] = {}  # the last call of each stream
        self._pending: dict[int, list[int]] = {}  # the calls that the next call of each stream waits for
        self._num_joined = 0  # the first calls, which a call in Python waited for

    def begin(self, node: ExecutionNode) -> None:
        """Call it before the calls of a node are added."""
        waits = [call for name in node.metadata.get(WAITS, ()) for call in self._events[name]]
        self._pending.setdefault(self._stream_of_node[node.node_id], []).extend(waits)

    def add_call(self, node: ExecutionNode) -> tuple[int, tuple[int, ...]]:
        """The stream of the next call, and the latest call of each other stream that it waits for."""
        stream, number = self._stream_of_node[node.node_id], len(self.stream_of)
        latest: dict[int, int] = {}
        for call in self._pending.pop(stream, ()):
            other = self.stream_of[call]
            if other != stream and call >= self._num_joined:
                latest[other] = max(call, latest.get(other, -1))
        self.stream_of.append(stream)
        self._last[stream] = number
        return stream, tuple(latest.values())

    def add_python_call(self) -> None:
        self._num_joined = len(self.stream_of)
        self._pending.clear()

    def end(self, node: ExecutionNode) -> None:
        """Call it after the calls of a node were added."""
        stream = self._stream_of_node[node.node_id]
        last = [self._last[stream]] if stream in self._last else []
        self._events[node.node_id] = (*last, *self._pending.get(stream, ()))
