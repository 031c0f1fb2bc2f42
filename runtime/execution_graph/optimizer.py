"""The optimizer: runs passes over a graph in order. Generated passes and hand-written ones mix freely."""

from collections.abc import Iterable

from sageLLM.generated.passes import PASSES
from sageLLM.generated.passes.comm import CommFusion as CommunicationFusionPass
from sageLLM.generated.passes.memory import MemoryOpt as MemoryOptimizationPass
from sageLLM.generated.passes.schedule import ComputeCommOverlap as ComputeCommOverlapPass
from sageLLM.generated.passes.schedule import KvPrefetch as KVPrefetchPass
from sageLLM.runtime.core.graph import ExecutionGraph
from sageLLM.runtime.core.rewrite import OptimizationPass

__all__ = [
    "PASSES",
    "CommunicationFusionPass",
    "ComputeCommOverlapPass",
    "GraphOptimizer",
    "KVPrefetchPass",
    "MemoryOptimizationPass",
    "OptimizationPass",
]


class GraphOptimizer:
    """Runs passes one after another; the graph that is given stays as it was.

    Without `passes` these are comm_fusion, compute_comm_overlap, kv_prefetch and memory_opt, in this order. The last
    one needs concrete sizes: give it a bound graph. With `verify` the graph is checked after every pass.
    """

    def __init__(self, passes: Iterable[OptimizationPass] | None = None, *, verify: bool = False) -> None:
        self.passes = list(default_passes() if passes is None else passes)
        self.verify = verify

    def add_pass(self, pass_: OptimizationPass) -> None:
        """Appends a pass; it runs after those that are there."""
        self.passes.append(pass_)

    def optimize(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The graph after all passes. Raises VerifyError naming the problems if a pass breaks it (with `verify`)."""
        result = graph.copy()
        for one in self.passes:
            result = one.apply(result)
            if self.verify:
                result.verify()
        return result


def default_passes() -> list[OptimizationPass]:
    """The four passes of the block graph, in the order in which they build on one another."""
    return [CommunicationFusionPass(), ComputeCommOverlapPass(), KVPrefetchPass(), MemoryOptimizationPass()]
