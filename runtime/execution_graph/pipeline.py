"""From a layout to the graphs that run: build, block passes, expand, kernel passes; each once per stage."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Unpack

from sageLLM.generated import ops
from sageLLM.runtime.core.dims import Dim, dims
from sageLLM.runtime.core.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir import TensorRef
from sageLLM.runtime.core.layout import KvShape, ModelLayout
from sageLLM.runtime.core.rewrite import PassReport
from sageLLM.runtime.core.writer import GraphWriter
from sageLLM.runtime.execution_graph.builder import build_block_graph
from sageLLM.runtime.execution_graph.embedding import Pooling, build_embedding_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.execution_graph.planner import Planner, Runnable, TorchPlanner
from sageLLM.runtime.execution_graph.rewriting import Choice, Rewriting
from sageLLM.runtime.kernels.cpu.arena import Arena
from sageLLM.runtime.kernels.cpu.weights import Weight

if TYPE_CHECKING:
    from sageLLM.runtime.engine.plugins import Registry


class Pipeline(Rewriting):
    """The graphs of one model. Sizes of the step stay symbolic, so each graph is built once per stage.

    `choice` names the passes and rules that take part, as in `Rewriting`; `planner` binds graphs to kernels, by default
    to the references. Only rewrite passes run here: what the others (streams, prefetch, memory places) decide is read
    by schedules and simulations; native plans place their memory by themselves.
    """

    def __init__(
        self,
        layout: ModelLayout,
        config: Any,
        registry: Registry,
        *,
        dtype: str,
        planner: Planner | None = None,
        **choice: Unpack[Choice],
    ) -> None:
        super().__init__(registry, **choice)
        self.layout = layout
        self.config = config
        self.dtype = dtype
        self.planner: Planner = planner or TorchPlanner(registry.kernels)
        self.reports: dict[Stage, list[PassReport]] = {}
        self._kernel_graphs: dict[Stage, ExecutionGraph] = {}

    @property
    def kernels(self) -> Mapping[str, Any]:
        """By op the function that runs it."""
        return self.registry.kernels

    def block_graph(self, stage: Stage) -> ExecutionGraph:
        """The graph of blocks, as placement and simulation see it."""
        return build_block_graph(self.layout, self.config, stage, dtype=self.dtype)

    def expanded_graph(self, stage: Stage) -> ExecutionGraph:
        """The kernel-level graph before its passes; those that rewrite the block graph have run."""
        with _paused_gc():
            return self._expanded(self.block_graph(stage))

    def _expanded(self, graph: ExecutionGraph) -> ExecutionGraph:
        for one in self.rewrite_passes("block"):
            one.transform(graph)
        return expand(graph, self.layout, self.config)

    def embedding_graph(self, pooling: Pooling, *, normalize: bool) -> ExecutionGraph:
        """The optimised kernel-level graph of a step that gives embeddings; see `build_embedding_graph`."""
        with _paused_gc():
            graph = build_embedding_graph(self.layout, self.config, pooling, normalize=normalize, dtype=self.dtype)
            graph = self._expanded(graph)
            self.rewrite(graph)
            return graph

    def kernel_graph(self, stage: Stage) -> ExecutionGraph:
        """The optimised kernel-level graph, which the executor runs."""
        if stage not in self._kernel_graphs:
            graph = self.expanded_graph(stage)
            try:
                with _paused_gc():
                    self.reports[stage] = self.rewrite(graph)
            except Exception:
                list(self.steps(self.expanded_graph(stage)))  # fails again, and keeps the graph on which it does
                raise
            self._kernel_graphs[stage] = graph
        return self._kernel_graphs[stage]

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None = None) -> Runnable:
        """The graph ready to run on the chosen kernels. Plans that share an arena run one after another."""
        return self.planner.plan(graph, bound, arena)

    def migrate_graph(self) -> ExecutionGraph:
        """Copies KV blocks between two pools: a KV_MIGRATE node per layer, over `source.` and `target.` caches."""
        return self._copy_graph("migrate", ops.kv_migrate, "SPG")

    def load_graph(self) -> ExecutionGraph:
        """Copies KV blocks from a storage tier: a KV_LOAD node per layer, over `source.` and `target.` caches."""
        return self._copy_graph("load", ops.kv_load, "TPG")

    def _copy_graph(self, name: str, copy: Callable[..., Iterable[TensorRef]], source_pages: str) -> ExecutionGraph:
        pages_from, pages_to, slots, moved = dims(f"{source_pages} PG BS M")
        c, kept = self.config, self.layout.cache(self.config)
        g = GraphWriter(name, level="kernel", stage=None, dtype=self.dtype)
        blocks = [g.input(name, "i32", moved) for name in ("src_blocks", "dst_blocks")]
        outputs: list[TensorRef] = []
        for i in range(c.L):
            with g.layer(i):
                sources = _cache_inputs(g, "source", i, kept, pages_from, slots)
                targets = _cache_inputs(g, "target", i, kept, pages_to, slots)
                outputs += copy(g, *sources, *targets, *blocks)
        return g.finish(outputs)


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Building a graph makes many objects that all stay: collecting in between finds nothing and doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _cache_inputs(g: GraphWriter, pool: str, layer: int, kept: KvShape, pages: Dim, slots: Dim) -> list[TensorRef]:
    """A layer's keys and values of one of the two pools."""
    shapes = {"k_cache": kept.k, "v_cache": kept.v}
    return [g.input(f"{pool}.layers.{layer}.{name}", g.dtype, pages, slots, *shape) for name, shape in shapes.items()]
