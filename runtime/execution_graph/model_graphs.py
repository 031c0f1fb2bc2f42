"""Pipeline from a layout to graphs: build, block passes, expand, kernel passes; once per stage, without torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

from sageLLM.generated.passes.place import NanoBatching
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.passes.base import PassReport
from sageLLM.runtime.execution_graph.attention_ffn import Side, disaggregate, drop_reductions, side_graph
from sageLLM.runtime.execution_graph.builder import build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.execution_graph.rewriting import Choice, Rewriting
from sageLLM.runtime.execution_graph.stages import WHOLE, PipelineStage, stage_graph
from sageLLM.runtime.registry.plugins import Registry


class ModelGraphs(Rewriting):
    """The graphs of one model. Sizes of the step stay symbolic, so each graph is built once per stage.

    With a `pipeline_stage` they are those of one stage, and with a `side` those of an attention worker or of an FFN
    worker. `choice` selects passes and rules as in `Rewriting`. Only rewrite passes run here: the other kinds (streams,
    prefetch, memory offsets) require concrete sizes, and serve schedules and simulations.
    """

    def __init__(
        self,
        layout: ModelLayout,
        config: Any,
        registry: Registry,
        *,
        dtype: str,
        pipeline_stage: PipelineStage = WHOLE,
        side: Side | None = None,
        **choice: Unpack[Choice],
    ) -> None:
        super().__init__(registry, **choice)
        self.side = side
        self.layout = layout
        self.config = config
        self.dtype = dtype
        self.pipeline_stage = pipeline_stage
        self.reports: dict[Stage, list[PassReport]] = {}
        self._kernel_graphs: dict[tuple[Stage, int], ExecutionGraph] = {}

    def block_graph(self, stage: Stage, num_ubatches: int = 1) -> ExecutionGraph:
        """The block-level graph, as placement and simulation use it; with several micro-batches, split into them."""
        graph = build_block_graph(self.layout, self.config, stage, dtype=self.dtype)
        graph = stage_graph(graph, self.pipeline_stage)
        if self.side is not None:
            if self.side.role == "ffn" and self.side.width > 1:
                drop_reductions(graph)
            disaggregate(graph, num_ubatches)
        elif num_ubatches > 1:
            split = NanoBatching(num_ubatches)
            split.transform(graph)
            assert "skipped" not in split.report.facts, f"{graph.graph_id}: {split.report.facts['skipped']}"
        return graph

    def expanded_graph(self, stage: Stage, num_ubatches: int = 1) -> ExecutionGraph:
        """The kernel-level graph before its passes, after those of the block graph."""
        with paused_gc():
            graph = self.expanded(self.block_graph(stage, num_ubatches))
            return graph if self.side is None else side_graph(graph, self.side, num_ubatches)

    def expanded(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The kernel-level graph of a block graph, to which the block-level passes are applied in place."""
        for one in self.rewrite_passes("block"):
            one.transform(graph)
        return expand(graph, self.layout, self.config)

    def kernel_graph(self, stage: Stage, num_ubatches: int = 1) -> ExecutionGraph:
        """The optimised kernel-level graph, which the executor runs."""
        key = stage, num_ubatches
        if key not in self._kernel_graphs:
            graph = self.expanded_graph(stage, num_ubatches)
            try:
                with paused_gc():
                    self.reports[stage] = self.rewrite(graph)
            except Exception:
                # Runs again pass by pass: it fails at the same point, and writes the graph there as a reproducer.
                list(self.steps(self.expanded_graph(stage, num_ubatches)))
                raise
            self._kernel_graphs[key] = graph
        return self._kernel_graphs[key]


@contextmanager
def paused_gc() -> Iterator[None]:
    """Disables garbage collection: building a graph allocates many objects that all live on.

    Collections in between free nothing and double the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
