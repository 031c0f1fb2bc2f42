"""Decode steps as CUDA graphs: a step is rounded up to one of few shapes, each of which is recorded once and replayed.

A bucket is a number of rows and a width of the block table, both powers of 2. The rows that fill it up repeat the last
row of the step: what they compute and store is what that row computes and stores, to the bit, so they change nothing.
No GPU was at hand when this was written; on a CPU only the rounding up is tested.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.planner import TorchPlanner
from sageLLM.runtime.executor.torch_plan import Plan

Inputs = Mapping[str, Tensor | None]

MOST_ROWS = 256
"""Rows of the largest step that is recorded."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One bucket: the graph, and the memory that it reads its inputs from and leaves its outputs in."""

    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    outputs: list[Tensor]

    def replay(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        for name, x in inputs.items():
            self.inputs[name].copy_(x, non_blocking=True)
        self.graph.replay()
        return self.outputs


class GpuPlanner(TorchPlanner):
    """`kernels` are launchers of Triton kernels, and references where there are none."""

    def __init__(self, kernels: Mapping[str, Kernel], device: torch.device) -> None:
        super().__init__(kernels, "triton")
        self._device = device

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Any], arena: Arena | None = None) -> Plan:
        plan = super().plan(graph, bound, arena)
        if self._device.type != "cuda" or graph.stage != "decode":
            return plan
        return GraphedPlan(graph, self._kernels, {name: x for name, x in bound.items() if isinstance(x, Tensor)})


class GraphedPlan(Plan):
    """A plan of the decode stage that runs by replay; steps of more than MOST_ROWS rows run call by call."""

    def __init__(self, graph: ExecutionGraph, kernels: Mapping[str, Kernel], bound: Mapping[str, Tensor]) -> None:
        super().__init__(graph, kernels, bound)
        self._recorded: dict[tuple[int, int], Recorded] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, inputs: Inputs) -> list[Tensor]:
        """The outputs of the step; they are overwritten by the next step of the same bucket."""
        given = {name: x for name, x in inputs.items() if x is not None}
        num_rows, width = given["block_table"].shape
        if not 0 < num_rows <= MOST_ROWS or len(given["rows"]) != num_rows:
            return super().run(inputs)
        bucket = round_up(num_rows), round_up(width)
        filled = fill(given, *bucket)
        if bucket not in self._recorded:
            self._recorded[bucket] = self._record(filled)
        return [x[:num_rows] for x in self._recorded[bucket].replay(filled)]

    def _record(self, inputs: Mapping[str, Tensor]) -> Recorded:
        """Runs the plan twice: once as it is, which compiles what has to be, and once into the graph."""
        own = {name: x.clone() for name, x in inputs.items()}
        super().run(own)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = super().run(own)
        return Recorded(graph, own, outputs)


def round_up(count: int) -> int:
    """The next power of 2."""
    return 1 << max(count - 1, 0).bit_length()


def fill(inputs: Mapping[str, Tensor], num_rows: int, width: int) -> dict[str, Tensor]:
    """The inputs of a decode step, [B, ...] each, with the last row repeated up to `num_rows` and a wider block table.

    `q_start`, which counts the rows, counts on; `rows` lists all rows.
    """
    more = num_rows - len(inputs["block_table"])
    filled = {name: torch.cat((x, x[-1:].expand(more, *x.shape[1:]))) for name, x in inputs.items()}
    filled["block_table"] = torch.nn.functional.pad(filled["block_table"], (0, width - filled["block_table"].shape[1]))
    if "q_start" in inputs:
        start = inputs["q_start"]
        counted = torch.arange(1, more + 1, dtype=start.dtype, device=start.device)
        filled["q_start"] = torch.cat((start, start[-1:] + counted))
    return filled
