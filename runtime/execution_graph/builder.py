"""Builder of block-level execution graphs: symbolic ones for the engine, and concrete ones for a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.ops.op_types import OpType
from sageLLM.runtime.core.cost import Hardware, annotate, estimate
from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.execution_graph.batch import DecodeBatch, PrefillBatch, step_sizes
from sageLLM.runtime.execution_graph.block_graph import whole_block_graph
from sageLLM.runtime.execution_graph.config import ModelConfig, ParallelConfig
from sageLLM.runtime.execution_graph.stage_sizes import choose_sizes
from sageLLM.runtime.execution_graph.stages import split_stages

__all__ = [
    "DecodeBatch",
    "ExecutionGraphBuilder",
    "ModelConfig",
    "ParallelConfig",
    "PrefillBatch",
    "build_block_graph",
]


def build_block_graph(
    layout: ModelLayout, config: Any, stage: Stage, parallel: ParallelConfig | None = None, dtype: str = "bf16"
) -> ExecutionGraph:
    """The block graph of one step with symbolic sizes (T, B, S...), from a config of the whole model or of one rank.

    The graph's `model_config` is the config with which it was built: a rank's share, under tensor parallelism.
    Pipeline stages require a config of the whole model. Raises ConfigError, a ValueError, if a degree does not divide
    the sizes.
    """
    parallel = parallel or ParallelConfig()
    graph = whole_block_graph(layout, config, stage, parallel.tensor_parallel_size, dtype)
    if parallel.pipeline_parallel_size == 1:
        return graph
    return split_stages(graph, choose_sizes(layout, config, parallel.pipeline_parallel_size))


class ExecutionGraphBuilder:
    """Builds concrete graphs for batches: bound shapes, estimated times and bytes, devices by pipeline stage.

    `layout` is a layout or the name of a generated one; `hardware` defaults to the generated "cpu". Every method raises
    ValueError for an invalid batch or degree, with the field and the remedy.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        parallel_config: ParallelConfig | None = None,
        *,
        layout: str | ModelLayout = "llama",
        hardware: Hardware | None = None,
        dtype: str = "bf16",
    ) -> None:
        self.model_config = model_config
        self.parallel_config = parallel_config or ParallelConfig()
        self.layout = _known_layout(layout) if isinstance(layout, str) else layout
        self.hardware = hardware or HARDWARE["cpu"]
        self.dtype = dtype
        self.config: Any = self.layout.read_config(HFConfig(self.layout.in_root(model_config.to_hf()), "ModelConfig"))
        self._symbolic: dict[Stage, ExecutionGraph] = {}

    def build_prefill_graph(self, batch: PrefillBatch) -> ExecutionGraph:
        """One step over whole prompts: stores all their KV, and samples each request's next token."""
        batch.check(self.model_config.max_seq_len)
        sizes = self._sizes(prefill=batch)
        return self._build("prefill", f"prefill_{batch.total_tokens}", sizes, {"prefill": sizes})

    def build_decode_graph(self, batch: DecodeBatch) -> ExecutionGraph:
        """One step of one token per request, each reading its own KV."""
        batch.check(self.model_config.max_seq_len)
        sizes = self._sizes(decode=batch)
        return self._build("decode", f"decode_{batch.batch_size}", sizes, {"decode": sizes})

    def build_hybrid_graph(self, prefill_batch: PrefillBatch, decode_batch: DecodeBatch) -> ExecutionGraph:
        """One step of prompt chunks and decodes; the rows of the decodes come first."""
        prefill_batch.check(self.model_config.max_seq_len)
        decode_batch.check(self.model_config.max_seq_len)
        sizes = self._sizes(prefill_batch, decode_batch)
        parts: dict[Stage, Mapping[str, Dim]] = {
            "prefill": self._sizes(prefill=prefill_batch),
            "decode": self._sizes(decode=decode_batch),
            "hybrid": sizes,
        }
        name = f"hybrid_{prefill_batch.total_tokens}_{decode_batch.batch_size}"
        return self._build("hybrid", name, sizes, parts)

    def _build_attention_node(
        self, layer_id: int, is_prefill: bool, batch_info: PrefillBatch | DecodeBatch
    ) -> ExecutionNode:
        """The attention node of a layer, as in the graph of the batch."""
        if is_prefill != isinstance(batch_info, PrefillBatch):
            expected = "PrefillBatch" if is_prefill else "DecodeBatch"
            raise ValueError(f"is_prefill={is_prefill}: expected a {expected}, got a {type(batch_info).__name__}")
        kind = OpType.PREFILL_ATTN if is_prefill else OpType.DECODE_ATTN
        return self._node_of_layer(self._build_any(batch_info), layer_id, kind)

    def _build_ffn_node(self, layer_id: int, batch_info: PrefillBatch | DecodeBatch) -> ExecutionNode:
        """The feed-forward node of a layer, as in the graph of the batch."""
        return self._node_of_layer(self._build_any(batch_info), layer_id, OpType.FFN)

    def _build_comm_node(self, layer_id: int, comm_type: OpType) -> ExecutionNode:
        """The first node of this type in a layer, with symbolic sizes; ValueError for a layer without one."""
        if not comm_type.is_comm:
            raise ValueError(f"expected a COMM_ op type, got {comm_type.name}")
        return self._node_of_layer(self._symbolic_graph("prefill"), layer_id, comm_type).copy()

    def _build_any(self, batch: PrefillBatch | DecodeBatch) -> ExecutionGraph:
        if isinstance(batch, PrefillBatch):
            return self.build_prefill_graph(batch)
        return self.build_decode_graph(batch)

    def _node_of_layer(self, graph: ExecutionGraph, layer_id: int, kind: OpType) -> ExecutionNode:
        if not 0 <= layer_id < self.model_config.num_layers:
            raise ValueError(f"layer_id must be 0 to {self.model_config.num_layers - 1}, got {layer_id}")
        found = [node for node in graph.nodes.values() if node.layer_id == layer_id and node.op_type is kind]
        if not found:
            degrees = self.parallel_config
            raise ValueError(
                f"expected a {kind.name} node in layer {layer_id}, got none with "
                f"tensor_parallel_size={degrees.tensor_parallel_size} "
                f"and pipeline_parallel_size={degrees.pipeline_parallel_size}"
            )
        return found[0]

    def _symbolic_graph(self, stage: Stage) -> ExecutionGraph:
        if stage not in self._symbolic:
            self._symbolic[stage] = build_block_graph(self.layout, self.config, stage, self.parallel_config, self.dtype)
        return self._symbolic[stage]

    def _build(
        self, stage: Stage, graph_id: str, sizes: Mapping[str, Dim], parts: Mapping[Stage, Mapping[str, Dim]]
    ) -> ExecutionGraph:
        symbolic = self._symbolic_graph(stage)  # built once per stage; a batch only binds its sizes
        graph = replace(symbolic.bind(**sizes), graph_id=graph_id, model_config=self.model_config)
        annotate(graph, self.hardware, sizes)
        times: dict[tuple[str, Stage, Hashable], float] = {}
        for node in graph.nodes.values():
            self._estimate_block(node, symbolic.model_config, stage, parts, times)
        return graph

    def _estimate_block(
        self,
        node: ExecutionNode,
        config: Any,
        stage: Stage,
        parts: Mapping[Stage, Mapping[str, Dim]],
        times: dict[tuple[str, Stage, Hashable], float],
    ) -> None:
        """Sets a block's time to that of its ops, and to 0 for a load of keys and values already on the device.

        The roofline of the block's inputs and outputs alone would miss the weights. Layers of one variant take the
        same time, so each variant is estimated once per phase.
        """
        if node.op_type is OpType.KV_LOAD and node.metadata.get("tier") == "device":
            node.estimated_time_us = 0.0
        if node.block is None or node.op_type not in self.layout.blocks[node.block].op_type.values():
            return
        phase = _phase_of(node, stage)
        layer = node.layer_id or 0
        key = (node.block, phase, self.layout.blocks[node.block].variant_of(config, layer))
        if key not in times:
            times[key] = self._body_time(node.block, layer, phase, config, parts[phase])
        node.estimated_time_us = times[key]

    def _body_time(self, block: str, layer: int, phase: Stage, config: Any, sizes: Mapping[str, Dim]) -> float:
        """Microseconds of a block's ops in a layer, without the KV store in prefill, which is a separate node."""
        writer = GraphWriter(block, level="kernel", stage=phase, dtype=self.dtype)
        self.layout.blocks[block].body(writer, config, phase, layer, *self._block_args(block, phase))
        nodes = writer.graph.nodes.values()
        excluded = OpType.KV_STORE if phase == "prefill" else None
        return sum(estimate(node, self.hardware, sizes).time_us for node in nodes if node.op_type is not excluded)

    def _block_args(self, block: str, phase: Stage) -> Sequence[Any]:
        """The operands of the block's first call, without loaded keys and values."""
        graph = self._symbolic_graph(phase)
        call = next(node for node in graph.nodes.values() if node.block == block and not node.op_type.is_kv)
        loaded = {ref.name for node in graph.nodes.values() if node.op_type.is_kv for ref in node.outputs}
        return [ref for ref in call.inputs if ref.name not in loaded]

    def _sizes(self, prefill: PrefillBatch | None = None, decode: DecodeBatch | None = None) -> dict[str, Dim]:
        """The values of the symbols of a step.

        EX counts the experts with weights to read: at most all of them, and at most one per token and routing choice.
        """
        sizes = step_sizes(prefill, decode)
        experts, per_token = getattr(self.config, "X", 0), getattr(self.config, "A", 0)
        return {
            **sizes,
            "P": self.model_config.max_seq_len,
            "EX": min(experts, sizes["T"] * per_token),
            "tp": self.parallel_config.tensor_parallel_size,
            "pp": self.parallel_config.pipeline_parallel_size,
        }


def _phase_of(node: ExecutionNode, stage: Stage) -> Stage:
    """The phase with the rows of a block node: in hybrid, attention nodes have those of one phase, others all."""
    if node.op_type is OpType.PREFILL_ATTN:
        return "prefill"
    return "decode" if node.op_type is OpType.DECODE_ATTN else stage


def _known_layout(name: str) -> ModelLayout:
    if name not in MODELS:
        raise ValueError(f"unknown layout '{name}'; known are {', '.join(MODELS)}")
    return MODELS[name]
