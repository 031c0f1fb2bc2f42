"""Gantt chart of a graph: a bar for each node with a duration, a row for each stream of each device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import Span, end_of, lane, time_spans
from sageLLM.runtime.inspect.drawing import category

WIDTH, LANE_HEIGHT, BAR_HEIGHT, LEFT, TOP = 900, 30, 22, 120, 22
NUM_TICKS = 6
CHARACTER, PADDING = 6.2, 6  # pixels of a letter in a bar, and of the space around its text
MIN_CLIPPED = 5  # letters of a clipped name that are still of use


def draw_gantt(graph: ExecutionGraph, index: Mapping[str, int], highlighted: Collection[str] = ()) -> str:
    """An SVG of the estimated times; empty if all are 0. `index` and `highlighted` as in `drawing.draw`."""
    spans = time_spans(graph.topological_sort())
    total = end_of(spans)
    if total <= 0:
        return ""
    lanes = sorted({lane(node) for node in graph.nodes.values()})
    row = {one: TOP + i * LANE_HEIGHT for i, one in enumerate(lanes)}
    height = TOP + len(lanes) * LANE_HEIGHT + 4
    bars = [
        _bar(node, spans[node.node_id], WIDTH / total, row[lane(node)], index, highlighted)
        for node in graph.nodes.values()
        if spans[node.node_id].end_us > spans[node.node_id].start_us
    ]
    names = [f'<text class="id" x="4" y="{y + 15}">device {d}, stream {s}</text>' for (d, s), y in row.items()]
    size = f'width="{LEFT + WIDTH + 10}" height="{height}" viewBox="0 0 {LEFT + WIDTH + 10} {height}"'
    return f'<svg class="gantt" {size}>{_axis(total, height)}{"".join(names)}{"".join(bars)}</svg>'


def _axis(total: float, height: int) -> str:
    ticks = [total * i / (NUM_TICKS - 1) for i in range(NUM_TICKS)]
    labels = [(LEFT + tick / total * WIDTH, f"{tick:,.1f} us") for tick in ticks]
    return "".join(
        f'<path class="tick" d="M{x:.0f} {TOP - 4}V{height}"/><text class="id" x="{x + 3:.0f}" y="13">{text}</text>'
        for x, text in labels[:-1]
    )


def _bar(
    node: ExecutionNode, span: Span, scale: float, y: int, index: Mapping[str, int], highlighted: Collection[str]
) -> str:
    width = max((span.end_us - span.start_us) * scale, 1.0)
    label = _label(node, int((width - PADDING) / CHARACTER))
    hover = f"{node.node_id}: {node.op}\n{span.start_us:,.2f} to {span.end_us:,.2f} us"
    css = f"node {category(node)}{' highlighted' if node.node_id in highlighted else ''}"
    return (
        f'<g class="{css}" data-i="{index[node.node_id]}" tabindex="0" role="button" '
        f'transform="translate({LEFT + span.start_us * scale:.1f} {y})">'
        f'<title>{escape(hover)}</title><rect width="{width:.1f}" height="{BAR_HEIGHT}" rx="3"/>'
        f'<text class="id" x="4" y="15">{escape(label)}</text></g>'
    )


def _label(node: ExecutionNode, room: int) -> str:
    """The longest name of a node that fits in `room` letters: its id, the id within its layer, its op, or nothing."""
    short = node.node_id.removeprefix(f"L{node.layer_id}.")
    for name in (node.node_id, short, node.op):
        if len(name) <= room:
            return name
    return f"{short[: room - 1]}…" if room > MIN_CLIPPED else ""
