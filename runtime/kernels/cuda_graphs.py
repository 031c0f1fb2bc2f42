"""Decode steps as CUDA graphs: a step is rounded up to one of few shapes, each of which is recorded once and replayed.

A bucket is a number of rows and a width of the block table, both powers of 2. The rows that fill it up repeat the last
row of the step: what they compute and store is what that row computes and stores, to the bit, so they change nothing.
No GPU was at hand when this was written; on a CPU only the rounding up is tested.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor | None]


class Runnable(Protocol):
    """A plan: `run(inputs)` gives its outputs, whose first dim is that of the step's rows."""

    def run(self, inputs: Inputs) -> list[Tensor]: ...


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


class GraphedPlan:
    """Runs a plan of the decode stage, on a GPU, by replay; steps of more than `most_rows` rows run call by call."""

    def __init__(self, plan: Runnable, most_rows: int = 256) -> None:
        self.plan = plan
        self.most_rows = most_rows
        self._recorded: dict[tuple[int, int], Recorded] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, inputs: Inputs) -> list[Tensor]:
        """The outputs of the step; they are overwritten by the next step of the same bucket."""
        given = {name: x for name, x in inputs.items() if x is not None}
        num_rows, width = given["block_table"].shape
        if not 0 < num_rows <= self.most_rows:
            return self.plan.run(inputs)
        bucket = round_up(num_rows), round_up(width)
        filled = fill(given, *bucket)
        if bucket not in self._recorded:
            self._recorded[bucket] = self._record(filled)
        return [x[:num_rows] for x in self._recorded[bucket].replay(filled)]

    def _record(self, inputs: Mapping[str, Tensor]) -> Recorded:
        """Runs the plan twice: once as it is, which compiles what has to be, and once into the graph."""
        own = {name: x.clone() for name, x in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.plan.run(own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = self.plan.run(own)
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
        filled["q_start"] = torch.cat((start, start[-1:] + torch.arange(1, more + 1, dtype=start.dtype, device=start.device)))
    return filled
