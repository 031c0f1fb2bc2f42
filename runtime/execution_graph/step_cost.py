"""Prediction of step durations from the model's kernel graph and the roofline of a device.

The graph of a hybrid step covers every step: one without prompts has 0 prompt tokens. The work of its kernels is
affine in the sizes of the step, so the coefficients are computed once, and a prediction is two small matrix products.
The experts of a mixture are not affine: all count as read in every step, which is accurate from some dozens of tokens.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sageLLM.generated.passes import PASSES
from sageLLM.runtime.core.cost import SECOND, Hardware, estimate, reach
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Level
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.passes.rewrite import RewritePass
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.scheduler.step_cost import StepWork

Sizes = Mapping[str, int]
SIZES = ("Td", "Tp", "S", "KV", "QK")
"""Decode tokens, prompt tokens, sequences, cached tokens that are read, pairs of a query and a key it attends to."""


class RooflineStepCost:
    """The duration of a step of a model on a device, or on each of `tensor_parallel_size` devices.

    Kernels run one after another; each takes the slower of its arithmetic and its memory traffic, plus a launch.
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
    ) -> None:
        self.hardware = hardware
        self.config = layout.shard_config(config, tensor_parallel_size)
        self._kept_per_layer = layout.cache(self.config).num_elements
        self.dtype = dtype
        self.graph = graph = _kernel_graph(layout, config, ParallelConfig(tensor_parallel_size), dtype)
        self.weight_bytes = sum(_num_bytes(ref.shape, ref.dtype) for ref in graph.weights.values())
        kernels = _Kernels(graph, hardware, {"tp": tensor_parallel_size, "EX": getattr(config, "X", 0)})
        self._flop_s, self._byte_s, self._link_s = kernels.tables()
        self._launch_s = hardware.launch_overhead_us / SECOND * kernels.num_launches

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values on one device, in all layers."""
        return int(self.config.L * self._kept_per_layer * DTYPES[self.dtype])

    def num_kv_blocks(self, block_size: int, memory_share: float = 0.9, pipeline_depth: int = 1) -> int:
        """KV blocks that fit next to the weights in a share of the device's memory; 0 if the weights do not fit.

        With a pipeline each of `pipeline_depth` devices has an equal share of the layers.
        """
        room = self.hardware.memory_bytes * memory_share * pipeline_depth - self.weight_bytes
        return max(0, int(room // (self.kv_bytes_per_token * block_size)))

    def transfer_s(self, num_tokens: int) -> float:
        """Seconds to transfer the KV of `num_tokens` tokens to another device."""
        return self.hardware.link.time_us(num_tokens * self.kv_bytes_per_token) / SECOND

    def link_s(self, work: StepWork) -> float:
        """Seconds of the collectives of a step, which are part of `step_s`; 0 on a single device."""
        return float(self._link_s @ np.array((1, *_sizes(work)), dtype=np.float64))

    def stage_transfer_s(self, num_tokens: int) -> float:
        """Seconds to transfer the residual stream of `num_tokens` tokens to the next stage of a pipeline."""
        return self.hardware.link.time_us(num_tokens * self.config.H * DTYPES[self.dtype]) / SECOND

    def step_s(self, work: StepWork) -> float:
        """Seconds of a step with this work; 0 without work."""
        if not work.num_tokens:
            return 0.0
        sizes = np.array((1, *_sizes(work)), dtype=np.float64)
        slower = np.maximum(self._flop_s @ sizes, self._byte_s @ sizes)
        return float(slower.sum() + self._link_s @ sizes) + self._launch_s


def _sizes(work: StepWork) -> Sequence[int]:
    cached, pairs = work.num_context_tokens, work.num_context_tokens
    for start, num_tokens in work.prefill:
        cached += start + num_tokens
        pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    num_sequences = work.num_decodes + len(work.prefill)
    return work.num_decodes, work.num_prompt_tokens, num_sequences, cached, pairs


def _kernel_graph(layout: ModelLayout, config: Any, parallel: ParallelConfig, dtype: str) -> ExecutionGraph:
    graph = build_block_graph(layout, config, "hybrid", parallel, dtype)
    _rewrite(graph, "block")
    graph = expand(graph, layout, graph.model_config)
    _rewrite(graph, "kernel")
    return graph


def _rewrite(graph: ExecutionGraph, level: Level) -> None:
    for one in PASSES.values():
        if one.level == level and issubclass(one, RewritePass):
            one().transform(graph)


class _Kernels:
    """The distinct kernels of a graph with their counts.

    A row of a table contains the seconds of one kernel: a constant, then those per unit of each of SIZES.
    """

    def __init__(self, graph: ExecutionGraph, hardware: Hardware, fixed: Sizes) -> None:
        self._hardware = hardware
        self._fixed = fixed
        ops = [node for node in graph.nodes.values() if isinstance(node, OpNode) and not node.is_view]
        texts = [f"{node.op} {node.flops({})} {node.bytes_moved({})}" for node in ops]
        self._counts = Counter(texts)
        self._ops = dict(zip(texts, ops, strict=True))
        self.num_launches = len(ops)

    def tables(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The tables by arithmetic and by memory, a row per kernel, and one row for all transfers over links."""
        flop_s, byte_s, link_s = [], [], np.zeros(len(SIZES) + 1)
        for text, node in self._ops.items():
            count = self._counts[text]
            if node.op_type.is_comm:
                link_s += count * self._affine(node, 2) / SECOND
                link_s[0] -= count * self._hardware.launch_overhead_us / SECOND
                continue
            flops_per_s, bytes_per_s = reach(node, self._hardware)
            flop_s.append(count * self._affine(node, 0) / flops_per_s)
            byte_s.append(count * self._affine(node, 1) / bytes_per_s)
        return np.array(flop_s), np.array(byte_s), link_s

    def _affine(self, node: OpNode, field: int) -> npt.NDArray[np.float64]:
        """The constant and the slopes of one field of the node's cost, measured at 1 and 1025 units of each size."""
        base = dict.fromkeys(SIZES, 1)
        at_base = self._cost(node, field, base)
        slopes = [(self._cost(node, field, base | {size: 1025}) - at_base) / 1024 for size in SIZES]
        return np.array([at_base - sum(slopes), *slopes])

    def _cost(self, node: OpNode, field: int, sizes: Sizes) -> float:
        env = {**sizes, **self._fixed, "T": sizes["Td"] + sizes["Tp"], "B": sizes["S"]}
        return float(estimate(node, self._hardware, env)[field])


def _num_bytes(shape: Sequence[Any], dtype: str) -> int:
    return int(np.prod([int(size) for size in shape], dtype=np.int64)) * DTYPES[dtype]
