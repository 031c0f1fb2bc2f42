"""When each node of a graph runs, by its estimated time: lanes in order, other lanes beside, dependencies first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sageLLM.runtime.core.ir.graph import ExecutionGraph


class Interval(NamedTuple):
    """Microseconds from the start of the step."""

    start: float
    end: float


def timeline(graph: ExecutionGraph, times_us: Mapping[str, float] | None = None) -> dict[str, Interval]:
    """The interval of each node, in the order in which they start in each lane.

    `times_us` are measured durations by node id; without it, or for a node that it lacks, the estimate counts. The last
    end is what `estimate_total_time` gives.
    """
    times = times_us or {}
    found: dict[str, Interval] = {}
    free_at: dict[tuple[int, int], float] = {}
    for node in graph.topological_sort():
        lane = (node.device_id, node.stream_id)
        start = max([free_at.get(lane, 0.0), *(found[d].end for d in node.dependencies)])
        end = start + times.get(node.node_id, node.estimated_time_us)
        found[node.node_id] = Interval(start, end)
        free_at[lane] = end
    return found
