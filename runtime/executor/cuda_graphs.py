"""Decode steps as CUDA graphs: a step is padded to one of a few shapes, each captured once and then replayed.

A captured graph has fixed shapes and addresses, so a bucket is a number of rows and a width of the block table, both
powers of 2. Padding repeats the last row of the step: its copies compute and store the same bits at the same slot, so
they change nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.executor.device_streams import StreamApi
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.planner import TorchPlanner
from sageLLM.runtime.executor.torch_plan import Plan

Inputs = Mapping[str, Tensor | None]

MAX_ROWS = 256
"""Rows of the largest step that is captured: every bucket costs memory, and launches matter less in larger steps."""


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """One bucket: the graph, the memory of its inputs, and the memory of its outputs."""

    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    outputs: list[Tensor]

    def replay(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        for name, x in inputs.items():
            self.inputs[name].copy_(x, non_blocking=True)
        self.graph.replay()
        return self.outputs


class GpuPlanner(TorchPlanner):
    """Plans for a GPU; `kernels` are launchers of Triton kernels, and references for ops without one."""

    def __init__(self, kernels: Mapping[str, Kernel], device: torch.device) -> None:
        super().__init__(kernels, "triton", device)

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Any], arena: Arena | None = None) -> Plan:
        plan = super().plan(graph, bound, arena)
        # Micro-batches have inputs of their own, for which steps are not padded to buckets.
        is_divided = "block_table" not in graph.inputs
        if self._api is None or graph.stage != "decode" or is_divided:
            return plan
        tensors = {name: x for name, x in bound.items() if isinstance(x, Tensor)}
        return GraphedPlan(graph, self._kernels, tensors, self._api)


class GraphedPlan(Plan):
    """A plan of the decode stage that replays CUDA graphs; steps of more than MAX_ROWS rows run call by call.

    Streams and collectives are captured too: NCCL's calls become nodes of the graph. All ranks capture the same buckets
    in the same steps, as they get the same orders.
    """

    def __init__(
        self,
        graph: ExecutionGraph,
        kernels: Mapping[str, Kernel],
        bound: Mapping[str, Tensor],
        api: StreamApi | None = None,
    ) -> None:
        super().__init__(graph, kernels, bound, api)
        self._captured: dict[tuple[int, int], CapturedGraph] = {}
        # One memory pool for all buckets: only one graph runs at a time, so they can share their intermediates.
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, inputs: Inputs) -> list[Tensor]:
        """The outputs of the step; the next step of the same bucket overwrites them."""
        present = {name: x for name, x in inputs.items() if x is not None}
        num_rows, width = present["block_table"].shape
        if not 0 < num_rows <= MAX_ROWS or len(present["rows"]) != num_rows:
            return super().run(inputs)
        bucket = round_up(num_rows), round_up(width)
        padded = pad_inputs(present, *bucket)
        if bucket not in self._captured:
            self._captured[bucket] = self._capture(padded)
        return [x[:num_rows] for x in self._captured[bucket].replay(padded)]

    def _capture(self, inputs: Mapping[str, Tensor]) -> CapturedGraph:
        """Runs the plan twice: once eagerly, as kernels cannot be compiled during capture, and once into the graph."""
        static_inputs = {name: x.clone() for name, x in inputs.items()}
        super().run(static_inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = super().run(static_inputs)
        return CapturedGraph(graph, static_inputs, outputs)


def round_up(count: int) -> int:
    """The next power of 2."""
    return 1 << max(count - 1, 0).bit_length()


def pad_inputs(inputs: Mapping[str, Tensor], num_rows: int, width: int) -> dict[str, Tensor]:
    """Pads the inputs [B, ...] of a decode step to `num_rows` rows, and the block table to `width` columns.

    The new rows repeat the last one, except in `q_start` [B + 1], which continues to count rows.
    """
    more = num_rows - len(inputs["block_table"])
    padded = {name: torch.cat((x, x[-1:].expand(more, *x.shape[1:]))) for name, x in inputs.items()}
    padded["block_table"] = torch.nn.functional.pad(padded["block_table"], (0, width - padded["block_table"].shape[1]))
    if "q_start" in inputs:
        start = inputs["q_start"]
        counted = torch.arange(1, more + 1, dtype=start.dtype, device=start.device)
        padded["q_start"] = torch.cat((start, start[-1:] + counted))
    return padded
