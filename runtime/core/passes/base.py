"""Base classes of graph passes, and the report that each run of a pass leaves."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph, Level, Stage
from sageLLM.runtime.core.rewrite.stats import RuleStats


@dataclass(slots=True)
class PassReport:
    """The result of one run of a pass. `facts` are figures of the pass, such as microseconds before and after."""

    name: str
    nodes_before: int
    nodes_after: int = 0
    seconds: float = 0.0
    rules: dict[str, RuleStats] = field(default_factory=dict)
    facts: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def fired(self) -> int:
        return sum(stats.fired for stats in self.rules.values())

    def __str__(self) -> str:
        head = f"{self.name}: {self.nodes_before} -> {self.nodes_after} nodes in {1e3 * self.seconds:.1f} ms"
        rules = [f"{rule} {stats}" for rule, stats in self.rules.items() if stats.tried]
        facts = [f"{name} {round(v, 2) if isinstance(v, float) else v}" for name, v in self.facts.items()]
        return "; ".join([head, *rules, *facts])


class OptimizationPass(ABC):
    """A named transformation. `apply` returns a valid graph and does not change its argument.

    `stage` and `level` are its position in the pipeline, `phases` the phases of the graphs on which it runs; `after`
    and `before` name passes that must precede and follow it. With `kernels` it is only for graphs that they compute.
    """

    spec: ClassVar[str] = ""
    stage: ClassVar[str] = "fuse"
    level: ClassVar[Level] = "kernel"
    phases: ClassVar[frozenset[Stage]] = frozenset({"prefill", "decode", "hybrid"})
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    kernels: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the pass in reports and options."""

    @abstractmethod
    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The transformed graph."""


class DeclaredPass(OptimizationPass):
    """A pass that a spec declares: a generated subclass has the declaration, its engine class implements `run`."""

    pass_name: ClassVar[str]

    def __init__(self) -> None:
        self.report = PassReport(self.pass_name, 0)

    @property
    def name(self) -> str:
        return self.pass_name

    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        """A transformed copy; sets `report`."""
        result = graph.copy()
        self.transform(result)
        return result

    def transform(self, graph: ExecutionGraph) -> None:
        """Transforms the graph in place, for a caller that owns it; sets `report`."""
        start = time.perf_counter()
        self.report = PassReport(self.pass_name, len(graph.nodes))
        if graph.stage is None or graph.stage in self.phases:
            self.run(graph)
        self.report.nodes_after = len(graph.nodes)
        self.report.seconds = time.perf_counter() - start

    @abstractmethod
    def run(self, graph: ExecutionGraph) -> None:
        """Transforms the graph in place and fills in the report."""
