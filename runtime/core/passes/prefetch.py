"""Prefetch of keys, values and weights: loads start some layers before their use, on a transfer stream."""

from __future__ import annotations

from typing import ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import Lane, lane
from sageLLM.runtime.core.ir.reachability import Reachability
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.effects import is_on_device, order_cache_effects
from sageLLM.runtime.core.passes.events import plan_events
from sageLLM.runtime.core.passes.order import reorder


class PrefetchPass(DeclaredPass):
    """Lets nodes of the op types `select` of layer i start when layer i - `prefetch_layers` starts, and not earlier.

    They run in parallel to the computation, on their current transfer stream or else on a new one. Two sets of edges
    bound the memory of prefetched values: from the last node of the layer before i - `prefetch_layers`, and from the
    users of earlier loads, so that at most `budget_bytes` are loaded and unused (a larger load runs alone; symbolic
    sizes are not counted). No dependency is removed, and a load follows every earlier store to its cache. Loads from
    the device's own tier are skipped, since they transfer nothing.
    """

    select: ClassVar[frozenset[str]] = frozenset()
    prefetch_layers: int = 1
    budget_bytes: int = 0

    def __init__(self, budget_bytes: int | None = None, prefetch_layers: int | None = None) -> None:
        """The arguments override the declaration: the budget e.g. by the free memory of a device."""
        super().__init__()
        if prefetch_layers is not None:
            self.prefetch_layers = prefetch_layers
        if budget_bytes is not None:
            self.budget_bytes = budget_bytes

    def run(self, graph: ExecutionGraph) -> None:
        before = graph.estimate_total_time()
        loads = [node for node in graph.nodes.values() if self._is_load(node)]
        if loads:
            order_cache_effects(graph)
            self._move(graph, loads)
            self._bound(graph, loads)
            reorder(graph)
            plan_events(graph)
        early = sum(1 for node in loads if node.layer_id)
        self.report.facts = {"prefetched": early, "us_before": before, "us_after": graph.estimate_total_time()}

    def _is_load(self, node: ExecutionNode) -> bool:
        return node.op_type.name in self.select and node.layer_id is not None and not is_on_device(node)

    def _move(self, graph: ExecutionGraph, loads: list[ExecutionNode]) -> None:
        """Moves the loads from streams with computation to a new stream."""
        others = [node for node in graph.nodes.values() if node.op_type.name not in self.select]
        taken = {node.stream_id for node in others}
        computing = {node.stream_id for node in others if not _is_transfer(node)}
        load_stream = max(taken, default=0) + 1
        for node in loads:
            if node.stream_id in computing:
                node.stream_id = load_stream

    def _bound(self, graph: ExecutionGraph, loads: list[ExecutionNode]) -> None:
        reach = Reachability(graph.topological_sort())
        last = {node.layer_id: node for node in graph.topological_sort() if not _is_io(node)}
        # The fence is the last node of the layer before i - ahead; when it ends, layer i - ahead may start.
        for node in loads:
            fence = last.get((node.layer_id or 0) - self.prefetch_layers - 1)
            self._wait(graph, reach, node, [] if fence is None else [fence])
        by_lane: dict[Lane, list[ExecutionNode]] = {}
        for node in loads:
            by_lane.setdefault(lane(node), []).append(node)
        for queue in by_lane.values():
            self._keep_budget(graph, reach, queue)

    def _keep_budget(self, graph: ExecutionGraph, reach: Reachability, queue: list[ExecutionNode]) -> None:
        """Bounds the unused bytes of a lane by a sliding window over its loads.

        Loads of a lane run in order, so each waits only for the users of the loads that leave the window.
        """
        users = _users(graph, queue)
        num_bytes, first = 0, 0
        for i, node in enumerate(queue):
            num_bytes += _num_bytes(node)
            while num_bytes > self.budget_bytes and first < i:
                num_bytes -= _num_bytes(queue[first])
                self._wait(graph, reach, node, users[queue[first].node_id])
                first += 1

    def _wait(
        self, graph: ExecutionGraph, reach: Reachability, load: ExecutionNode, fences: list[ExecutionNode]
    ) -> None:
        for fence in fences:
            if reach.are_independent(load.node_id, fence.node_id):  # implied otherwise, or it would make a cycle
                graph.add_edge(fence.node_id, load.node_id)
                reach.add_edge(fence.node_id, load.node_id)


def _users(graph: ExecutionGraph, loads: list[ExecutionNode]) -> dict[str, list[ExecutionNode]]:
    """The nodes that depend on each load: by a value, or by an edge only, as the readers of loaded weights."""
    users: dict[str, list[ExecutionNode]] = {load.node_id: [] for load in loads}
    for node in graph.nodes.values():
        for load in users.keys() & node.dependencies:
            users[load].append(node)
    return users


def _is_io(node: ExecutionNode) -> bool:
    """Whether a node moves data between tiers, or keys and values within the device."""
    return node.op_type.is_kv or node.op_type.name == "WEIGHT_LOAD"


def _is_transfer(node: ExecutionNode) -> bool:
    return _is_io(node) or node.op_type.is_comm


def _num_bytes(node: ExecutionNode) -> int:
    """The bytes that a load transfers; 0 while they are symbolic."""
    is_bound = all(ref.is_bound for ref in node.outputs)
    return sum(ref.num_bytes for ref in node.outputs) if is_bound else 0
