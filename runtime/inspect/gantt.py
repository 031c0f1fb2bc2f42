"""A Gantt chart of a graph: a bar for each node that takes time, a lane for each stream of each device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.inspect.drawing import category
from sageLLM.runtime.inspect.timeline import Interval, timeline

WIDTH, LANE_HEIGHT, BAR_HEIGHT, LEFT, TOP = 900, 30, 22, 120, 22
NUM_TICKS = 6
CHARACTER = 6.2  # pixels of a letter in a bar


def draw_gantt(graph: ExecutionGraph, index: Mapping[str, int], lit: Collection[str] = ()) -> str:
    """An SVG of the estimated times; empty if no node has any. `index` and `lit` as in `drawing.draw`."""
    intervals = timeline(graph)
    total = max((interval.end for interval in intervals.values()), default=0.0)
    if total <= 0:
        return ""
    lanes = sorted({(node.device_id, node.stream_id) for node in graph.nodes.values()})
    row = {lane: TOP + i * LANE_HEIGHT for i, lane in enumerate(lanes)}
    height = TOP + len(lanes) * LANE_HEIGHT + 4
    bars = [
        _bar(node, intervals[node.node_id], WIDTH / total, row[node.device_id, node.stream_id], index, lit)
        for node in graph.nodes.values()
        if intervals[node.node_id].end > intervals[node.node_id].start
    ]
    names = [f'<text class="id" x="4" y="{y + 15}">device {d}, stream {s}</text>' for (d, s), y in row.items()]
    size = f'width="{LEFT + WIDTH + 10}" height="{height}" viewBox="0 0 {LEFT + WIDTH + 10} {height}"'
    return f'<svg class="gantt" {size}>{_axis(total, height)}{"".join(names)}{"".join(bars)}</svg>'


def _axis(total: float, height: int) -> str:
    ticks = [total * i / (NUM_TICKS - 1) for i in range(NUM_TICKS)]
    places = [(LEFT + tick / total * WIDTH, f"{tick:,.1f} us") for tick in ticks]
    return "".join(
        f'<path class="tick" d="M{x:.0f} {TOP - 4}V{height}"/><text class="id" x="{x + 3:.0f}" y="13">{text}</text>'
        for x, text in places[:-1]
    )


def _bar(
    node: ExecutionNode, when: Interval, scale: float, y: int, index: Mapping[str, int], lit: Collection[str]
) -> str:
    width = max((when.end - when.start) * scale, 1.0)
    label = node.node_id[: int(width / CHARACTER)] if width > 4 * CHARACTER else ""
    hover = f"{node.node_id}: {node.op}\n{when.start:,.2f} to {when.end:,.2f} us"
    return (
        f'<g class="node {category(node)}{" lit" if node.node_id in lit else ""}" data-i="{index[node.node_id]}" '
        f'tabindex="0" role="button" transform="translate({LEFT + when.start * scale:.1f} {y})">'
        f'<title>{escape(hover)}</title><rect width="{width:.1f}" height="{BAR_HEIGHT}" rx="3"/>'
        f'<text class="id" x="4" y="15">{escape(label)}</text></g>'
    )
