"""Layered drawing of a few nodes: their rows and columns, and the SVG.

Rows are by longest path from the top; within a row nodes are sorted by the mean column of their dependencies (the
barycentre method of Sugiyama, Tagawa and Toda, IEEE Transactions on Systems, Man, and Cybernetics 11(2), 1981). An
edge over several rows has a slot in each, so that it passes between the boxes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

from sageLLM.runtime.core.ir.nodes import ExecutionNode

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 190, 40, 20, 30, 12
SLOT_WIDTH = 6  # of a passing edge
MAX_TEXT = 24

Slot: TypeAlias = tuple[str, int]  # a node id and a row: the node's box, or its passing edges in a later row


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows by node id, and the horizontal centre of every slot, in pixels from the left."""

    row: Mapping[str, int]
    center: Mapping[Slot, float]

    def corner(self, node_id: str) -> tuple[float, float]:
        """The upper left corner of a node's box."""
        row = self.row[node_id]
        return self.center[node_id, row] - BOX_WIDTH / 2, top_of(row)


def top_of(row: int) -> float:
    return MARGIN + row * (BOX_HEIGHT + GAP_Y)


def category(node: ExecutionNode) -> str:
    """The colour class of a node's op type."""
    kind = node.op_type.name
    if node.op_type.is_comm:
        return "comm"
    if node.op_type.is_kv:
        return "kv"
    if kind.endswith("_ATTN"):
        return "attn"
    if kind in ("FFN", "LINEAR", "LM_HEAD", "ACTIVATION"):
        return "gemm"
    if kind == "LAYERNORM":
        return "norm"
    if kind == "ROPE":
        return "rope"
    return "io" if kind in ("EMBEDDING", "SAMPLE") else "other"


def draw(nodes: Sequence[ExecutionNode], index: Mapping[str, int], highlighted: Collection[str] = ()) -> str:
    """An SVG of nodes in topological order. `index` numbers the nodes of the whole graph for the page's script.

    A node with dependencies outside the drawing has a stub at its top; users outside are listed on the page only.
    """
    plan = layout(nodes)
    width = max(plan.center.values()) + BOX_WIDTH / 2 + MARGIN
    height = top_of(max(plan.row.values())) + BOX_HEIGHT + MARGIN
    edges = [_edge(plan, d, n.node_id) for n in nodes for d in sorted(n.dependencies) if d in plan.row]
    stubs = [_stub(plan.corner(n.node_id)) for n in nodes if not n.dependencies <= plan.row.keys()]
    boxes = [_box(n, plan.corner(n.node_id), index[n.node_id], is_highlighted=n.node_id in highlighted) for n in nodes]
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f"<svg {size}>{''.join(edges)}{''.join(stubs)}{''.join(boxes)}</svg>"


def layout(nodes: Sequence[ExecutionNode]) -> Layout:
    """The layout of topologically sorted nodes; dependencies outside are ignored."""
    row: dict[str, int] = {}
    above: dict[Slot, list[Slot]] = {}
    rows: list[list[Slot]] = []
    for node in nodes:
        here = row[node.node_id] = 1 + max((row[d] for d in node.dependencies if d in row), default=-1)
        rows += [[] for _ in range(len(rows), here + 1)]
        rows[here].append((node.node_id, here))
    for node in nodes:
        here = row[node.node_id]
        inside = sorted(d for d in node.dependencies if d in row)
        above[node.node_id, here] = [(d, here - 1) for d in inside]
        for slot in [(d, r) for d in inside for r in range(row[d] + 1, here)]:
            if slot not in above:
                above[slot] = [(slot[0], slot[1] - 1)]
                rows[slot[1]].append(slot)
    center: dict[Slot, float] = {}
    for slots in rows:
        _arrange(slots, row, above, center)
    shift = MARGIN + BOX_WIDTH / 2 - min(center.values(), default=0.0)
    return Layout(row, {slot: x + shift for slot, x in center.items()})


def _arrange(
    slots: list[Slot], row: Mapping[str, int], above: Mapping[Slot, list[Slot]], center: dict[Slot, float]
) -> None:
    """Places the slots of one row side by side around 0, ordered by the mean position of the slots above them."""

    def barycentre(slot: Slot) -> float:
        return sum(center[s] for s in above[slot]) / len(above[slot]) if above[slot] else 0.0

    widths = {slot: BOX_WIDTH if row[slot[0]] == slot[1] else SLOT_WIDTH for slot in slots}
    x = -(sum(widths.values()) + GAP_X * (len(slots) - 1)) / 2
    for slot in sorted(slots, key=barycentre):
        center[slot] = x + widths[slot] / 2
        x += widths[slot] + GAP_X


def _box(node: ExecutionNode, corner: tuple[float, float], index: int, *, is_highlighted: bool) -> str:
    x, y = corner
    name = node.node_id.removeprefix(f"L{node.layer_id}.")
    css = f"node {category(node)}{' highlighted' if is_highlighted else ''}"
    return (
        f'<g class="{css}" data-i="{index}" tabindex="0" role="button" '
        f'transform="translate({x:.0f} {y:.0f})"><title>{escape(_hover(node))}</title>'
        f'<rect width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
        f'<text class="op" x="10" y="17">{escape(_clip(node.op))}</text>'
        f'<text class="id" x="10" y="32">{escape(_clip(name))}</text></g>'
    )


def _hover(node: ExecutionNode) -> str:
    outputs = "\n".join(map(str, node.outputs))
    return f"{node.node_id} ({node.op_type.name})\n{outputs}\n{node.estimated_time_us:.1f} us"


def _edge(plan: Layout, start: str, end: str) -> str:
    """A curve from box to box, straight between the boxes of the rows that it passes."""
    x, y = plan.center[start, plan.row[start]], top_of(plan.row[start]) + BOX_HEIGHT
    path = f"M{x:.0f} {y:.0f}"
    for row in range(plan.row[start] + 1, plan.row[end] + 1):
        x_next = plan.center[end if row == plan.row[end] else start, row]
        y_next = top_of(row)
        bend = (y + y_next) / 2
        path += f"C{x:.0f} {bend:.0f} {x_next:.0f} {bend:.0f} {x_next:.0f} {y_next:.0f}"
        x, y = x_next, y_next + BOX_HEIGHT
        path += f"V{y:.0f}" if row < plan.row[end] else ""
    return f'<path class="edge" d="{path}"/>'


def _stub(corner: tuple[float, float]) -> str:
    x, y = corner[0] + BOX_WIDTH / 2, corner[1]
    return f'<path class="edge stub" d="M{x:.0f} {y - 9:.0f}V{y:.0f}"/>'


def _clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
