"""Time of transfers between tiers, and the part of it during which the step computes: hidden, instead of waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.core.cost import Hardware, annotate
from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import time_spans

Times = npt.NDArray[np.float64]


class IoOverlap(NamedTuple):
    """Seconds of transfers between tiers, and those of them in which kernels ran as well."""

    io_s: float
    hidden_s: float

    @property
    def hidden_fraction(self) -> float:
        return self.hidden_s / self.io_s if self.io_s else 1.0

    def plus(self, other: IoOverlap) -> IoOverlap:
        return IoOverlap(self.io_s + other.io_s, self.hidden_s + other.hidden_s)


NO_IO = IoOverlap(0.0, 0.0)


def is_io(node: ExecutionNode) -> bool:
    """Whether a node moves data between tiers."""
    return str(node.metadata.get("tier", "device")) != "device"


def measure_overlap(io: Times, compute: Times) -> IoOverlap:
    """The overlap of intervals of io and of computation, each [n, 2] with begin and end in seconds."""
    if not len(io):
        return NO_IO
    total = float((io[:, 1] - io[:, 0]).sum())
    return IoOverlap(total, _covered(compute, io[:, 1]) - _covered(compute, io[:, 0]) if len(compute) else 0.0)


def _covered(intervals: Times, moments: Times) -> float:
    """The sum over the moments of the time before each that the intervals cover."""
    ordered = intervals[np.argsort(intervals[:, 0])]
    ends = np.maximum.accumulate(ordered[:, 1])
    # Intervals of several streams may overlap: each counts from the end of those before it.
    begins = np.minimum(np.maximum(ordered[:, 0], np.concatenate(([-np.inf], ends[:-1]))), ends)
    before = np.concatenate(([0.0], np.cumsum(ends - begins)))
    index = np.searchsorted(begins, moments, side="right") - 1
    inside = np.minimum(moments, ends[index]) - begins[index]
    return float(np.where(index < 0, 0.0, before[index] + inside).sum())


def planned_overlap(graph: ExecutionGraph, hardware: Hardware, sizes: Mapping[str, Dim]) -> IoOverlap:
    """The overlap of a kernel graph by its estimated times. Raises IRError if `sizes` lacks a size of the step."""
    planned = graph.copy()
    annotate(planned, hardware, sizes)
    order = planned.topological_sort()
    spans = time_spans(order)

    def intervals(nodes: Sequence[ExecutionNode]) -> Times:
        times = [spans[node.node_id] for node in nodes]
        return np.array([(span.start_us, span.end_us) for span in times]).reshape(-1, 2) / 1e6

    return measure_overlap(
        intervals([node for node in order if is_io(node)]), intervals([node for node in order if not is_io(node)])
    )
