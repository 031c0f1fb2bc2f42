"""Lets loads of keys and values start some layers ahead of their use, on a stream of their own."""

from __future__ import annotations

from typing import ClassVar

from sageLLM.runtime.core.graph import ExecutionGraph
from sageLLM.runtime.core.ir import ExecutionNode
from sageLLM.runtime.core.passes.order import Reachability, order_cache_effects, put_in_order
from sageLLM.runtime.core.rewrite import DeclaredPass


class PrefetchPass(DeclaredPass):
    """Nodes of the op types `select` of layer i may start when layer i - `ahead` does, and not earlier.

    They run beside the computation, on the transfer stream that they are on already or else on a new one. An edge from
    the last node of the layer before i - `ahead` bounds how much is loaded in advance: `ahead` + 1 layers. No
    dependency is taken away, and a load stays behind every store to its cache that stands before it.
    """

    select: ClassVar[frozenset[str]] = frozenset()
    ahead: ClassVar[int] = 1

    def run(self, graph: ExecutionGraph) -> None:
        before = graph.estimate_total_time()
        loads = [
            node for node in graph.nodes.values() if node.op_type.name in self.select and node.layer_id is not None
        ]
        if loads:
            order_cache_effects(graph)
            self._move(graph, loads)
            self._bound(graph, loads)
            put_in_order(graph)
        early = sum(1 for node in loads if node.layer_id)
        self.report.facts = {"prefetched": early, "us_before": before, "us_after": graph.estimate_total_time()}

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
            if fence is not None and not reach.waits_for(fence.node_id, node.node_id):
                graph.add_edge(fence.node_id, node.node_id)
                reach.add_edge(fence.node_id, node.node_id)
