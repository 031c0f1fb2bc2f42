"""From a layout to graphs: build, block passes, expand, kernel passes; each once per stage. Needs no torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.passes.base import PassReport
from sageLLM.runtime.execution_graph.builder import build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.execution_graph.rewriting import Choice, Rewriting
from sageLLM.runtime.registry.plugins import Registry


class ModelGraphs(Rewriting):
    """The graphs of one model. Sizes of the step stay symbolic, so each graph is built once per stage.

    `choice` names the passes and rules that take part, as in `Rewriting`. Only rewrite passes run here: what the others
    (streams, prefetch, memory places) decide is read by schedules and simulations.
    """

    def __init__(
        self, layout: ModelLayout, config: Any, registry: Registry, *, dtype: str, **choice: Unpack[Choice]
    ) -> None:
        super().__init__(registry, **choice)
        self.layout = layout
        self.config = config
        self.dtype = dtype
        self.reports: dict[Stage, list[PassReport]] = {}
        self._kernel_graphs: dict[Stage, ExecutionGraph] = {}

    def block_graph(self, stage: Stage) -> ExecutionGraph:
        """The graph of blocks, as placement and simulation see it."""
        return build_block_graph(self.layout, self.config, stage, dtype=self.dtype)

    def expanded_graph(self, stage: Stage) -> ExecutionGraph:
        """The kernel-level graph before its passes; those that rewrite the block graph have run."""
        with paused_gc():
            return self.expanded(self.block_graph(stage))

    def expanded(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The kernel-level graph of a block graph, which is changed by the passes of its level."""
        for one in self.rewrite_passes("block"):
            one.transform(graph)
        return expand(graph, self.layout, self.config)

    def kernel_graph(self, stage: Stage) -> ExecutionGraph:
        """The optimised kernel-level graph, which the executor runs."""
        if stage not in self._kernel_graphs:
            graph = self.expanded_graph(stage)
            try:
                with paused_gc():
                    self.reports[stage] = self.rewrite(graph)
            except Exception:
                list(self.steps(self.expanded_graph(stage)))  # fails again, and keeps the graph on which it does
                raise
            self._kernel_graphs[stage] = graph
        return self._kernel_graphs[stage]


@contextmanager
def paused_gc() -> Iterator[None]:
    """Building a graph makes many objects that all stay: collecting in between finds nothing and doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
