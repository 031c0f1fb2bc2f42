"""Prediction of step durations from the model's kernel graph and the roofline of a device.

The graph of a hybrid step covers every step: one without prompts has 0 prompt tokens. The work of its kernels is
affine in the sizes of the step, so the coefficients are computed once, and a prediction is a few small matrix products.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sageLLM.generated.passes import PASSES
from sageLLM.runtime.core.cost import SECOND, Hardware
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Level
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.model.kv_form import KvForm, kv_bytes, kv_sizes
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.passes.rewrite import RewritePass
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.execution_graph.stage_sizes import choose_sizes, weight_reads
from sageLLM.runtime.execution_graph.step_tables import Experts, StepTables
from sageLLM.runtime.scheduler.step_cost import StepWork

DivideLayers = Callable[[ModelLayout, Any, int], tuple[int, ...]]
"""The numbers of layers of the stages of a pipeline, of which the last argument is the number."""


class RooflineStepCost:
    """The duration of a step of a model on a device, or on each of `tensor_parallel_size` devices.

    Kernels run one after another; each takes its arithmetic and memory traffic at the efficiency that the device has
    for its family, plus a launch. With `is_fused` they are those of the engine, with all rewrites; without it every op
    is a kernel, as in an engine without epilogues. The tokens of a step are assumed to select experts uniformly. The
    experts are distributed over `expert_parallel_size` workers, all with as many tokens; `exchange_s` is the time to
    exchange them. `kv_form` is the form of the KV cache, by default of elements.

    Raises ConfigError if the degree does not divide the model's sizes.
    """

    def __init__(
        self,
        layout: ModelLayout,
        config: Any,
        hardware: Hardware,
        *,
        dtype: str = "bf16",
        tensor_parallel_size: int = 1,
        is_fused: bool = True,
        expert_parallel_size: int = 1,
        kv_form: KvForm | None = None,
    ) -> None:
        self.hardware = hardware
        self._layout, self._whole = layout, config
        self.config = layout.shard_config(config, tensor_parallel_size)
        self._kept_per_layer = kv_bytes(layout.cache(self.config), kv_form, DTYPES[dtype])
        self.dtype = dtype
        parallel = ParallelConfig(tensor_parallel_size)
        self.graph = graph = _kernel_graph(layout, config, parallel, dtype, is_fused)
        self.experts = Experts(getattr(config, "X", 0), getattr(config, "A", 0), expert_parallel_size)
        self.num_moe_layers = sum(node.op_type.name == "ROUTER" for node in graph.nodes.values())
        self.weight_bytes = weight_bytes(graph, expert_parallel_size)
        self._tables = StepTables(graph, hardware, {"tp": tensor_parallel_size, **kv_sizes(kv_form)}, self.experts)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values on one device, in all layers."""
        return int(self.config.L * self._kept_per_layer)

    def num_kv_blocks(
        self,
        block_size: int,
        memory_share: float = 0.9,
        pipeline_depth: int = 1,
        divide: DivideLayers = choose_sizes,
    ) -> int:
        """KV blocks that fit next to the weights in a share of the device's memory; 0 if the weights do not fit.

        With a pipeline of `pipeline_depth` devices, among which `divide` divides the layers, the one with the least
        room for the KV of its layers decides. Raises ConfigError if there are fewer layers than devices.
        """
        room = self.hardware.memory_bytes * memory_share
        if pipeline_depth == 1:
            return max(0, int((room - self.weight_bytes) // (self.kv_bytes_per_token * block_size)))
        sizes = divide(self._layout, self._whole, pipeline_depth)
        block_bytes = self._kept_per_layer * block_size
        blocks = [
            (room - held) // (num_layers * block_bytes)
            for num_layers, held in zip(sizes, stage_weight_bytes(self.graph, sizes), strict=True)
        ]
        return max(0, int(min(blocks)))

    def stage_shares(self, num_stages: int, divide: DivideLayers = choose_sizes) -> tuple[float, ...]:
        """The part of the time of a step that each pipeline stage takes, by the weights that it reads.

        Raises ConfigError if there are fewer layers than stages.
        """
        sizes = divide(self._layout, self._whole, num_stages)
        read = weight_reads(self._layout, self._whole).of_stages(sizes)
        return tuple(num_bytes / sum(read) for num_bytes in read)

    def transfer_s(self, num_tokens: int) -> float:
        """Seconds to transfer the KV of `num_tokens` tokens to another device."""
        return self.hardware.link.time_us(num_tokens * self.kv_bytes_per_token) / SECOND

    def link_s(self, work: StepWork) -> float:
        """Seconds of the collectives of a step, which are part of `step_s`; 0 on a single device."""
        return self._tables.link_s(work)

    def exchange_s(self, work: StepWork) -> float:
        """Seconds to gather the tokens of all workers before the experts of each layer, and to scatter their sums."""
        hops = self.experts.num_workers - 1
        num_bytes = hops * work.num_tokens * self.config.H * DTYPES[self.dtype]
        return 2 * self.num_moe_layers * self.hardware.link.time_us(num_bytes, hops) / SECOND if hops else 0.0

    def stage_transfer_s(self, num_tokens: int) -> float:
        """Seconds to transfer the residual stream of `num_tokens` tokens to the next stage of a pipeline."""
        return self.hardware.link.time_us(num_tokens * self.config.H * DTYPES[self.dtype]) / SECOND

    def step_s(self, work: StepWork) -> float:
        """Seconds of a step with this work; 0 without work."""
        return self._tables.seconds(work) if work.num_tokens else 0.0


def _kernel_graph(
    layout: ModelLayout, config: Any, parallel: ParallelConfig, dtype: str, is_fused: bool
) -> ExecutionGraph:
    graph = build_block_graph(layout, config, "hybrid", parallel, dtype)
    if is_fused:
        _rewrite(graph, "block")
    graph = expand(graph, layout, graph.model_config)
    if is_fused:
        _rewrite(graph, "kernel")
    return graph


def weight_bytes(graph: ExecutionGraph, expert_parallel_size: int) -> int:
    """Bytes of the weights on one device, with its share of the experts."""
    stacked = {node.inputs[2].name for node in graph.nodes.values() if "experts" in getattr(node, "tags", ())}
    total = 0
    for name, ref in graph.weights.items():
        total += _num_bytes(ref.shape, ref.dtype) // (expert_parallel_size if name in stacked else 1)
    return total


def stage_weight_bytes(graph: ExecutionGraph, sizes: Sequence[int]) -> list[int]:
    """Bytes of the weights on each device of a pipeline in stages of so many layers."""
    stage_of_layer = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    held: list[dict[str, int]] = [{} for _ in sizes]
    outside = 0
    for node in graph.topological_sort():
        if node.layer_id is not None:
            outside = len(sizes) - 1
        stage = outside if node.layer_id is None else stage_of_layer[node.layer_id]
        for ref in node.inputs:
            if ref.name in graph.weights:
                held[stage][ref.name] = _num_bytes(ref.shape, ref.dtype)
    return [sum(weights.values()) for weights in held]


def _rewrite(graph: ExecutionGraph, level: Level) -> None:
    """Applies the rewrites of all devices. Those for one kind of kernels hold for steps of few rows only."""
    for one in PASSES.values():
        if one.level == level and not one.kernels and issubclass(one, RewritePass):
            one().transform(graph)


def _num_bytes(shape: Sequence[Any], dtype: str) -> int:
    return int(np.prod([int(size) for size in shape], dtype=np.int64)) * DTYPES[dtype]
