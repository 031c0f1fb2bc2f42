"""A layered drawing of a few nodes: who stands in which row and column, and the SVG that shows it.

Rows are by longest path from the top; within a row nodes stand by the mean column of what they depend on (the
barycentre method of Sugiyama, Tagawa and Toda, IEEE Transactions on Systems, Man, and Cybernetics 11(2), 1981).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from sageLLM.runtime.core.ir import ExecutionNode

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 176, 40, 20, 30, 12
MAX_TEXT = 24

Place = tuple[float, float]  # the upper left corner of a box, in pixels


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
    return "io" if kind in ("EMBEDDING", "SAMPLE") else "other"


def draw(nodes: Sequence[ExecutionNode], index: Mapping[str, int]) -> str:
    """An SVG of nodes in topological order. `index` numbers the nodes of the whole graph for the page's script.

    A node that waits for nodes outside has a stub at its top; one that nodes outside wait for is told by the page.
    """
    places = layout(nodes)
    width = max(x for x, _ in places.values()) + BOX_WIDTH + MARGIN
    height = max(y for _, y in places.values()) + BOX_HEIGHT + MARGIN
    edges = [_edge(places[d], places[n.node_id]) for n in nodes for d in sorted(n.dependencies) if d in places]
    stubs = [_stub(places[n.node_id]) for n in nodes if not n.dependencies <= places.keys()]
    boxes = [_box(node, places[node.node_id], index[node.node_id]) for node in nodes]
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f"<svg {size}>{''.join(edges)}{''.join(stubs)}{''.join(boxes)}</svg>"


def layout(nodes: Sequence[ExecutionNode]) -> dict[str, Place]:
    """Where each node stands; nodes come in topological order, and dependencies outside do not count."""
    row: dict[str, int] = {}
    for node in nodes:
        row[node.node_id] = 1 + max((row[d] for d in node.dependencies if d in row), default=-1)
    by_id = {node.node_id: node for node in nodes}
    column: dict[str, float] = {}
    for number in sorted(set(row.values())):
        members = [node_id for node_id, r in row.items() if r == number]
        members.sort(key=lambda node_id: _barycentre(by_id[node_id], column))
        for i, node_id in enumerate(members):
            column[node_id] = i - (len(members) - 1) / 2
    left = min(column.values(), default=0.0)
    return {
        node_id: (MARGIN + (column[node_id] - left) * (BOX_WIDTH + GAP_X), MARGIN + row[node_id] * (BOX_HEIGHT + GAP_Y))
        for node_id in row
    }


def _barycentre(node: ExecutionNode, column: Mapping[str, float]) -> float:
    above = [column[d] for d in node.dependencies if d in column]
    return sum(above) / len(above) if above else 0.0


def _box(node: ExecutionNode, place: Place, index: int) -> str:
    x, y = place
    name = node.node_id.removeprefix(f"L{node.layer_id}.")
    return (
        f'<g class="node {category(node)}" data-i="{index}" tabindex="0" role="button" '
        f'transform="translate({x:.0f} {y:.0f})"><title>{escape(_hover(node))}</title>'
        f'<rect width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
        f'<text class="op" x="10" y="17">{escape(_clip(node.op))}</text>'
        f'<text class="id" x="10" y="32">{escape(_clip(name))}</text></g>'
    )


def _hover(node: ExecutionNode) -> str:
    outputs = "\n".join(map(str, node.outputs))
    return f"{node.node_id} ({node.op_type.name})\n{outputs}\n{node.estimated_time_us:.1f} us"


def _edge(start: Place, end: Place) -> str:
    x1, y1 = start[0] + BOX_WIDTH / 2, start[1] + BOX_HEIGHT
    x2, y2 = end[0] + BOX_WIDTH / 2, end[1]
    middle = (y1 + y2) / 2
    curve = f"{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
    return f'<path class="edge" d="M{x1:.0f} {y1:.0f}C{curve}"/>'


def _stub(place: Place) -> str:
    x, y = place[0] + BOX_WIDTH / 2, place[1]
    return f'<path class="edge stub" d="M{x:.0f} {y - 9:.0f}V{y:.0f}"/>'


def _clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
