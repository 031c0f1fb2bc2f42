"""Runs a function as a pass: the way out for what no kind of pass can say."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.passes.base import DeclaredPass

GraphFunction: TypeAlias = "staticmethod[[ExecutionGraph], int]"


class FunctionPass(DeclaredPass):
    """Calls `function` with the graph, which it changes in place; it gives the number of its changes for the report."""

    function: ClassVar[GraphFunction]

    def run(self, graph: ExecutionGraph) -> None:
        self.report.facts = {"changes": self.function(graph)}
