"""Graph optimizer: runs generated and hand-written passes over a graph, in order."""

import time
from collections.abc import Iterable, Mapping

from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.passes import PASSES
from sageLLM.generated.passes.comm import CommFusion as CommunicationFusionPass
from sageLLM.generated.passes.memory import MemoryOpt as MemoryOptimizationPass
from sageLLM.generated.passes.schedule import ComputeCommOverlap as ComputeCommOverlapPass
from sageLLM.generated.passes.schedule import KvPrefetch as KVPrefetchPass
from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.core.errors import VerifyError
from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.passes.base import DeclaredPass, OptimizationPass, PassReport
from sageLLM.runtime.core.passes.check import verify_schedule

__all__ = [
    "PASSES",
    "CommunicationFusionPass",
    "ComputeCommOverlapPass",
    "GraphOptimizer",
    "KVPrefetchPass",
    "MemoryOptimizationPass",
    "OptimizationPass",
    "default_passes",
]


def default_passes(hardware: Hardware | None = None, sizes: Mapping[str, Dim] | None = None) -> list[OptimizationPass]:
    """comm_fusion, compute_comm_overlap, kv_prefetch and memory_opt, in this order.

    `hardware`, by default the generated "cpu", defines the latency that merging transfers saves; `sizes` binds the
    ranks of the groups, such as {"tp": 8}.
    """
    return [
        CommunicationFusionPass(hardware or HARDWARE["cpu"], sizes),
        ComputeCommOverlapPass(),
        KVPrefetchPass(),
        MemoryOptimizationPass(),
    ]


class GraphOptimizer:
    """Runs passes one after another on a copy of the graph.

    `passes` defaults to `default_passes()`, of which memory_opt requires a graph with bound sizes. With `verify` the
    graph is checked after every pass. `report` contains the report of each pass of the last run.
    """

    def __init__(self, passes: Iterable[OptimizationPass] | None = None, *, verify: bool = False) -> None:
        self.passes = list(default_passes() if passes is None else passes)
        self.verify = verify
        self.report: list[PassReport] = []

    def add_pass(self, pass_: OptimizationPass) -> None:
        """Appends a pass; it runs last."""
        self.passes.append(pass_)

    def optimize(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The graph after all passes. With `verify`, raises VerifyError naming the pass that broke it."""
        self.report = []
        result = graph.copy()
        for one in self.passes:
            result = self._run(one, result)
            if self.verify:
                _check(result, one.name)
        return result

    def _run(self, one: OptimizationPass, graph: ExecutionGraph) -> ExecutionGraph:
        """The graph after a pass. A declared pass works in place, since the graph is already a copy."""
        if isinstance(one, DeclaredPass):
            one.transform(graph)
            self.report.append(one.report)
            return graph
        start, num_nodes = time.perf_counter(), len(graph.nodes)
        result = one.apply(graph)
        self.report.append(PassReport(one.name, num_nodes, len(result.nodes), time.perf_counter() - start))
        return result


def _check(graph: ExecutionGraph, pass_name: str) -> None:
    try:
        verify(graph)
        verify_schedule(graph)
    except VerifyError as error:
        raise VerifyError([f"after {pass_name}: {problem}" for problem in error.problems]) from None
