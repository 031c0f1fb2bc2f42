"""Table of planned and measured times of a graph's nodes, stream by stream."""

from __future__ import annotations

from collections.abc import Mapping

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.order import Span, end_of, lane, time_spans
from sageLLM.runtime.core.passes.events import WAITS


def side_by_side(graph: ExecutionGraph, measured: Mapping[str, Span], plan: str, run: str) -> str:
    """A line per node with a duration, in the order of each stream; `plan` and `run` name the two schedules."""
    order = graph.topological_sort()
    planned = time_spans(order)
    width = max((len(node.node_id) for node in order), default=4)
    lines = [f"us from the start of the step; planned: {plan}; measured: {run}"]
    for device, stream in sorted({lane(node) for node in order}):
        lines += ["", f"device {device}, stream {stream}"]
        lines.append(f"  {'node':<{width}}  {'planned':>9} {'for':>8}  {'measured':>9} {'for':>8}  waits for")
        for node in order:
            one, other = planned[node.node_id], measured[node.node_id]
            if lane(node) == (device, stream) and (one.end_us > one.start_us or other.end_us > other.start_us):
                waits = ", ".join(node.metadata.get(WAITS, ()))
                lines.append(f"  {node.node_id:<{width}}  {_columns(one)}  {_columns(other)}  {waits}".rstrip())
    lines += ["", f"step: planned {end_of(planned):,.1f} us, measured {end_of(measured):,.1f} us"]
    lines.append(f"overlap of streams: planned {_overlap_us(planned, graph):,.1f} us, "
                 f"measured {_overlap_us(measured, graph):,.1f} us")  # fmt: skip
    return "\n".join(lines)


def _columns(span: Span) -> str:
    return f"{span.start_us:>9,.1f} {span.end_us - span.start_us:>8,.1f}"


def _overlap_us(spans: Mapping[str, Span], graph: ExecutionGraph) -> float:
    """The time in which at least two streams run a node."""
    changes = [
        (moment, step)
        for node_id in graph.nodes
        for moment, step in ((spans[node_id].start_us, 1), (spans[node_id].end_us, -1))
        if spans[node_id].end_us > spans[node_id].start_us
    ]
    total, running, last = 0.0, 0, 0.0
    for moment, step in sorted(changes):  # an end before a beginning at the same moment
        if running > 1:
            total += moment - last
        running, last = running + step, moment
    return total
