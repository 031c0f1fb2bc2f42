"""Function passes: an arbitrary function as a pass, for transformations that no declared kind can express."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.passes.base import DeclaredPass

GraphFunction: TypeAlias = "staticmethod[[ExecutionGraph], int]"


class FunctionPass(DeclaredPass):
    """Calls `function`, which changes the graph in place and returns the number of changes for the report."""

    function: ClassVar[GraphFunction]

    def run(self, graph: ExecutionGraph) -> None:
        self.report.facts = {"changes": self.function(graph)}
