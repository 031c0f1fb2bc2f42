"""Measures the hidden part of the transfers between tiers in each step of a plan."""

import numpy as np

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.execution_graph.io_overlap import NO_IO, is_io, measure_overlap
from sageLLM.runtime.executor.native.flatten import Flattened


class IoMeter:
    """The io of the steps of a plan: of the last one, and of all. Reading the clock costs 0.1 us per call."""

    def __init__(self, graph: ExecutionGraph, flat: Flattened) -> None:
        self._stamps = np.zeros((len(flat.calls), 4), dtype=np.int64)  # `Stamp` in runner.cpp
        self._is_io = np.array([is_io(graph.nodes[node_id]) for node_id in flat.nodes], dtype=bool)
        self.last = self.total = NO_IO
        self.num_steps = 0

    @property
    def address(self) -> int:
        """The memory to which the runner writes times."""
        return int(self._stamps.ctypes.data)

    def end_step(self) -> None:
        """Adds the step whose times have been written."""
        seconds = self._stamps[:, :2] / 1e9
        seconds -= seconds[0, 0]
        self.last = measure_overlap(seconds[self._is_io], seconds[~self._is_io])
        self.total = self.total.plus(self.last)
        self.num_steps += 1


def make_meter(graph: ExecutionGraph, flat: Flattened) -> IoMeter | None:
    """A meter for a graph with transfers between tiers, and no others."""
    return IoMeter(graph, flat) if any(map(is_io, graph.nodes.values())) else None
