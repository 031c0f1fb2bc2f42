"""Lets loads of keys and values start some layers ahead of their use, on a stream of their own."""

from __future__ import annotations

from typing import ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.events import plan_events
from sageLLM.runtime.core.passes.order import Lane, Reachability, is_on_device, lane, order_cache_effects, put_in_order


class PrefetchPass(DeclaredPass):
    """Nodes of the op types `select` of layer i may start when layer i - `ahead` does, and not earlier.

    They run beside the computation, on the transfer stream that they are on already or else on a new one. What is
    loaded in advance is bounded twice, by edges: from the last node of the layer before i - `ahead`, and from the
    readers of earlier loads where otherwise more than `budget_bytes` would be loaded and not yet read (a load that is
    larger waits until it is alone, and symbolic sizes bound nothing). No dependency is taken away, and a load stays
    behind every store to its cache that stands before it. A load of what is on the device already is none.
    """

    select: ClassVar[frozenset[str]] = frozenset()
    ahead: ClassVar[int] = 1
    budget_bytes: int = 0

    def __init__(self, budget_bytes: int | None = None) -> None:
        """A budget other than the declared one, as for the memory that a device has left."""
        super().__init__()
        if budget_bytes is not None:
            self.budget_bytes = budget_bytes

    def run(self, graph: ExecutionGraph) -> None:
        before = graph.estimate_total_time()
        loads = [node for node in graph.nodes.values() if self._is_load(node)]
        if loads:
            order_cache_effects(graph)
            self._move(graph, loads)
            self._bound(graph, loads)
            put_in_order(graph)
            plan_events(graph)
        early = sum(1 for node in loads if node.layer_id)
        self.report.facts = {"prefetched": early, "us_before": before, "us_after": graph.estimate_total_time()}

    def _is_load(self, node: ExecutionNode) -> bool:
        return node.op_type.name in self.select and node.layer_id is not None and not is_on_device(node)

    def _move(self, graph: ExecutionGraph, loads: list[ExecutionNode]) -> None:
        """From a stream with computation to one of their own."""
        taken = {node.stream_id for node in graph.nodes.values() if node.op_type.name not in self.select}
        computing = {n.stream_id for n in graph.nodes.values() if not n.op_type.is_kv and not n.op_type.is_comm}
        own = max(taken, default=0) + 1
        for node in loads:
            if node.stream_id in computing:
                node.stream_id = own

    def _bound(self, graph: ExecutionGraph, loads: list[ExecutionNode]) -> None:
        reach = Reachability(graph)
        last = {node.layer_id: node for node in graph.topological_sort() if not node.op_type.is_kv}
        for node in loads:
            fence = last.get((node.layer_id or 0) - self.ahead - 1)
            self._wait(graph, reach, node, [] if fence is None else [fence])
        by_lane: dict[Lane, list[ExecutionNode]] = {}
        for node in loads:
            by_lane.setdefault(lane(node), []).append(node)
        for queue in by_lane.values():
            self._keep_budget(graph, reach, queue)

    def _keep_budget(self, graph: ExecutionGraph, reach: Reachability, queue: list[ExecutionNode]) -> None:
        """Loads of a lane run in order, so each has to wait for the readers of those alone that leave the window."""
        held, first = 0, 0
        for i, node in enumerate(queue):
            held += _num_bytes(node)
            while held > self.budget_bytes and first < i:
                held -= _num_bytes(queue[first])
                readers = [user for ref in queue[first].outputs for user in graph.users(ref)]
                self._wait(graph, reach, node, readers)
                first += 1

    def _wait(
        self, graph: ExecutionGraph, reach: Reachability, load: ExecutionNode, fences: list[ExecutionNode]
    ) -> None:
        for fence in fences:
            if reach.are_independent(load.node_id, fence.node_id):
                graph.add_edge(fence.node_id, load.node_id)
                reach.add_edge(fence.node_id, load.node_id)


def _num_bytes(node: ExecutionNode) -> int:
    """The bytes that a load brings; 0 while they are symbolic, which bounds nothing."""
    is_bound = all(isinstance(size, int) for ref in node.outputs for size in ref.shape)
    return sum(ref.num_bytes for ref in node.outputs) if is_bound else 0
