"""Estimates when the nodes of a step run, also where streams share a device and slow down one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.passes.order import Lane, lane


class Share(NamedTuple):
    """What a stream takes of the device while others run too: a part of its units, and the speed it has with them."""

    part: float
    speed: float


class Span(NamedTuple):
    """When a node runs, in microseconds from the start of the step."""

    start_us: float
    end_us: float


def time_spans(graph: ExecutionGraph) -> dict[str, Span]:
    """When each node runs, lanes in order, if lanes do not slow down one another: see `estimate_total_time`."""
    spans: dict[str, Span] = {}
    free_at: dict[Lane, float] = {}
    for node in graph.topological_sort():
        one = lane(node)
        start = max([free_at.get(one, 0.0), *(spans[d].end_us for d in node.dependencies)])
        spans[node.node_id] = Span(start, start + node.estimated_time_us)
        free_at[one] = spans[node.node_id].end_us
    return spans


def simulate(graph: ExecutionGraph, shares: Mapping[int, Share]) -> dict[str, Span]:
    """When each node runs, lanes in order, if streams with a share slow down those without, and the other way round.

    Alone on its device a node takes its estimated time. Beside others, one on a stream with a share has the share's
    speed, and one on another stream has what the parts of the shares leave (the resource model of NanoFlow, arXiv
    2408.12757, section 4).
    """
    return _Simulation(graph, shares).run()


class _Simulation:
    """The state between two events: how much work of each running node is left."""

    def __init__(self, graph: ExecutionGraph, shares: Mapping[int, Share]) -> None:
        self.shares = shares
        self.queues: dict[Lane, list[ExecutionNode]] = {}
        for node in graph.topological_sort():
            self.queues.setdefault(lane(node), []).append(node)
        for queue in self.queues.values():
            queue.reverse()
        self.left: dict[Lane, float] = {}
        self.running: dict[Lane, ExecutionNode] = {}
        self.started: dict[str, float] = {}
        self.spans: dict[str, Span] = {}

    def run(self) -> dict[str, Span]:
        now = 0.0
        while self._start(now) or self.running:
            speeds = {one: self._speed(one) for one in self.running}
            step = min(self.left[one] / speed for one, speed in speeds.items())
            now += step
            for one, speed in speeds.items():
                self.left[one] -= step * speed
            ending = [one for one in self.running if self.left[one] <= 1e-9]
            for one in ending:
                node = self.running.pop(one)
                self.spans[node.node_id] = Span(self.started[node.node_id], now)
        return self.spans

    def _start(self, now: float) -> bool:
        """Starts the first node of every free lane whose dependencies are done."""
        ready = [
            one
            for one, queue in self.queues.items()
            if queue and one not in self.running and queue[-1].dependencies <= self.spans.keys()
        ]
        for one in ready:
            node = self.queues[one].pop()
            self.running[one], self.left[one] = node, node.estimated_time_us
            self.started[node.node_id] = now
        return bool(ready)

    def _speed(self, one: Lane) -> float:
        beside = [other for other in self.running if other[0] == one[0] and other != one and self.left[other] > 0.0]
        if one[1] in self.shares:
            return self.shares[one[1]].speed if beside else 1.0
        return 1.0 - sum(self.shares[other[1]].part for other in beside if other[1] in self.shares)
