"""Simulation of a step on streams that share a device and slow down each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import Lane, Span, lane


class Share(NamedTuple):
    """The resources of a stream while others run too: the part of the device's units, and its speed on that part."""

    part: float
    speed: float


def simulate(graph: ExecutionGraph, shares: Mapping[int, Share]) -> dict[str, Span]:
    """The time spans of the nodes, each lane in order, if streams with and without a share slow down each other.

    Alone on its device a node takes its estimated time. Concurrent to others, a node on a stream with a share runs at
    the share's speed, and a node on another stream with the units that the shares leave (the resource model of
    NanoFlow, arXiv 2408.12757, section 4).
    """
    return _Simulation(graph, shares).run()


class _Simulation:
    """The state between two events: the remaining work of each running node."""

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
        """Starts the first node of every free lane if its dependencies are done."""
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
        concurrent = [o for o in self.running if o[0] == one[0] and o != one and self.left[o] > 0.0]
        if one[1] in self.shares:
            return self.shares[one[1]].speed if concurrent else 1.0
        return 1.0 - sum(self.shares[other[1]].part for other in concurrent if other[1] in self.shares)
