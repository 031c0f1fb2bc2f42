"""Compiles a model: builds its graphs, those of embeddings and of KV block copies, and binds them to kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Unpack

from torch import Tensor

from sageLLM.generated import ops
from sageLLM.runtime.core.ir.dims import Dim, dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.core.model.kv_form import KvForm
from sageLLM.runtime.core.model.layout import KvShape, ModelLayout
from sageLLM.runtime.core.passes.base import PassReport
from sageLLM.runtime.core.passes.schedule import StreamPass
from sageLLM.runtime.execution_graph.attention_ffn import Side
from sageLLM.runtime.execution_graph.embedding import Pooling, build_embedding_graph
from sageLLM.runtime.execution_graph.local_sampling import sample_locally
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs, paused_gc
from sageLLM.runtime.execution_graph.rewriting import Choice
from sageLLM.runtime.execution_graph.stages import WHOLE, PipelineStage
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.executor.planner import Planner, Runnable, TorchPlanner
from sageLLM.runtime.registry.plugins import Registry

Schedule = Callable[[ExecutionGraph, Iterable[StreamPass]], list[PassReport]]
"""Assigns streams to the nodes of a kernel graph in place, with these passes."""


class WeightStream(Protocol):
    """Weights that plans read from a file in each run; `tensors` are inputs of the graphs that `streamed` returns."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def streamed(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The graph with the loads of the weights."""


class ModelCompiler(ModelGraphs):
    """The graphs of one model, and the planner that turns them into plans, by default on the torch references.

    With a `schedule`, kernel graphs have the streams that it assigns; by default they have one stream. With
    `samples_locally` ranks find the greedy tokens together, and the other outputs are the logits of the rank's share.
    `kv_form` is the form of the caches that plans bind.
    """

    def __init__(
        self,
        layout: ModelLayout,
        config: Any,
        registry: Registry,
        *,
        dtype: str,
        planner: Planner | None = None,
        schedule: Schedule | None = None,
        samples_locally: bool = False,
        pipeline_stage: PipelineStage = WHOLE,
        side: Side | None = None,
        kv_form: KvForm | None = None,
        **choice: Unpack[Choice],
    ) -> None:
        self.planner: Planner = planner or TorchPlanner(registry.kernels)
        choice = {"backend": self.planner.name, **choice}
        super().__init__(layout, config, registry, dtype=dtype, pipeline_stage=pipeline_stage, side=side, **choice)
        self.weight_stream: WeightStream | None = None
        self.kv_form = kv_form
        self._schedule, self.samples_locally = schedule, samples_locally

    @property
    def kernels(self) -> Mapping[str, Any]:
        """The reference kernel of each op."""
        return self.registry.kernels

    def kernel_graph(self, stage: Stage, num_ubatches: int = 1) -> ExecutionGraph:
        """The optimised kernel-level graph, with streams, which the executor runs."""
        is_new = (stage, num_ubatches) not in self._kernel_graphs
        graph = super().kernel_graph(stage, num_ubatches)
        if is_new and self.samples_locally:
            sample_locally(graph, self.config.rank, self.config.V)
        if is_new and self._schedule is not None:
            self.reports[stage] += self._schedule(graph, self.stream_passes())
        return graph

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None = None) -> Runnable:
        """Binds a kernel-level graph to kernels and tensors. Plans that share an arena must run one after another.

        With a `weight_stream` the plan reads the weights of streamed layers in each run.
        """
        if self.weight_stream is not None:
            graph, bound = self.weight_stream.streamed(graph), {**bound, **self.weight_stream.tensors}
        return self.planner.plan(graph, bound, arena)

    def embedding_graph(self, pooling: Pooling, *, normalize: bool) -> ExecutionGraph:
        """The optimised kernel-level graph of a step that computes embeddings; see `build_embedding_graph`."""
        with paused_gc():
            graph = build_embedding_graph(self.layout, self.config, pooling, normalize=normalize, dtype=self.dtype)
            graph = self.expanded(graph)
            self.rewrite(graph)
            return graph

    def migrate_graph(self) -> ExecutionGraph:
        """A graph that copies KV blocks between two pools or tiers: a `kv_copy` node per layer.

        Its inputs are the caches of both pools under the prefixes `source.` and `target.`, and the block numbers
        `src_blocks` and `dst_blocks`, i32[M] each.
        """
        pages_from, pages_to, slots, moved = dims("SPG PG BS M")
        c, kept = self.config, self.layout.cache(self.config)
        g = GraphWriter("migrate", level="kernel", stage=None, dtype=self.dtype)
        blocks = [g.input(name, "i32", moved) for name in ("src_blocks", "dst_blocks")]
        outputs: list[TensorRef] = []
        for i in self.pipeline_stage.layers(c.L):
            with g.layer(i):
                sources = _cache_inputs(g, "source", i, kept, pages_from, slots)
                targets = _cache_inputs(g, "target", i, kept, pages_to, slots)
                outputs += ops.kv_copy(g, *sources, *targets, *blocks)
        return g.finish(outputs)


def _cache_inputs(g: GraphWriter, pool: str, layer: int, kept: KvShape, pages: Dim, slots: Dim) -> list[TensorRef]:
    """A layer's keys and values of one of the two pools."""
    shapes = {"k_cache": kept.k, "v_cache": kept.v}
    return [g.input(f"{pool}.layers.{layer}.{name}", g.dtype, pages, slots, *shape) for name, shape in shapes.items()]
