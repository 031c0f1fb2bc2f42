"""Runs passes over an execution graph one after another, and keeps what each reports."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.passes.comm import CommFusion as CommunicationFusionPass
from sageLLM.generated.passes.memory import MemoryOpt as MemoryOptimizationPass
from sageLLM.generated.passes.schedule import ComputeCommOverlap as ComputeCommOverlapPass
from sageLLM.generated.passes.schedule import KvPrefetch as KVPrefetchPass
from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.core.errors import VerifyError
from sageLLM.runtime.core.graph import ExecutionGraph
from sageLLM.runtime.core.rewrite import DeclaredPass, OptimizationPass, PassReport

__all__ = [
    "CommunicationFusionPass",
    "ComputeCommOverlapPass",
    "GraphOptimizer",
    "KVPrefetchPass",
    "MemoryOptimizationPass",
    "OptimizationPass",
]


def default_passes(hardware: Hardware | None = None) -> list[OptimizationPass]:
    """comm_fusion, compute_comm_overlap, kv_prefetch and memory_opt, in this order; hardware gives the latencies."""
    return [
        CommunicationFusionPass(hardware or HARDWARE["cpu"]),
        ComputeCommOverlapPass(),
        KVPrefetchPass(),
        MemoryOptimizationPass(),
    ]


class GraphOptimizer:
    """Applies passes in order. Passes from specs and hand-written subclasses of OptimizationPass mix freely.

    `passes` defaults to `default_passes()`. With `verify` the graph is verified after each pass, and a VerifyError
    names the pass. `report` tells what each pass of the last run did.
    """

    def __init__(self, passes: Sequence[OptimizationPass] | None = None, *, verify: bool = False) -> None:
        self.passes = list(passes) if passes is not None else default_passes()
        self.verify = verify
        self.report: list[PassReport] = []

    def add_pass(self, pass_: OptimizationPass) -> None:
        """Run one more pass after those that are there."""
        self.passes.append(pass_)

    def optimize(self, graph: ExecutionGraph) -> ExecutionGraph:
        """An optimised graph; the given one is left as it was."""
        self.report = []
        result = graph.copy()
        for one in self.passes:
            result = self._apply(one, result)
        return result

    def _apply(self, one: OptimizationPass, graph: ExecutionGraph) -> ExecutionGraph:
        start, num_nodes = time.perf_counter(), len(graph.nodes)
        result = one.apply(graph)
        seconds = time.perf_counter() - start
        if isinstance(one, DeclaredPass):
            self.report.append(one.report)
        else:
            self.report.append(PassReport(one.name, num_nodes, len(result.nodes), seconds))
        if self.verify:
            try:
                result.verify()
            except VerifyError as error:
                raise VerifyError([f"after {one.name}: {problem}" for problem in error.problems]) from None
        return result
