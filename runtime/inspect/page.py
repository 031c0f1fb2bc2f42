"""Self-contained HTML page of execution graphs: one file, without network access, in light and dark mode."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.inspect.drawing import draw
from sageLLM.runtime.inspect.gantt import draw_gantt

CATEGORIES = {
    "attn": "attention",
    "gemm": "linear",
    "norm": "norm",
    "io": "embedding, sampling",
    "comm": "communication",
    "kv": "KV cache",
    "rope": "rotary embedding",
    "other": "other",
}
OPEN_SECTIONS = 3  # the nodes before the layers and the first two layers
MAX_REMOVED = 200  # removed nodes that are listed


@dataclass(frozen=True, slots=True)
class Step:
    """A graph to show, e.g. after a pass. Changes from `before` are highlighted; `note` describes the step."""

    name: str
    graph: ExecutionGraph
    before: ExecutionGraph | None = None
    note: str = ""


def to_html(graphs: Sequence[ExecutionGraph] | Mapping[str, ExecutionGraph], title: str = "Execution graphs") -> str:
    """One HTML page with each graph, titled by its key or its graph_id. IRError for an empty collection."""
    named = list(graphs.items()) if isinstance(graphs, Mapping) else [(g.graph_id, g) for g in graphs]
    return to_page({"graphs": [Step(name, graph) for name, graph in named]}, title)


def to_page(traces: Mapping[str, Sequence[Step]], title: str) -> str:
    """One HTML page: the steps of each trace on the left, the graph of the selected step next to them.

    A graph is drawn in foldable sections, one per layer, and as a chart of its streams if its nodes have times. Changed
    nodes are highlighted. A click on a node shows its types, attributes, cost, origins, spec entry, layer and stream.
    The address `#g2/5` opens step 2 and node 5. Every name is escaped. IRError for an empty collection or a cycle.
    """
    steps = [step for trace in traces.values() for step in trace]
    if not steps:
        raise IRError("expected at least one graph to show")
    numbers = iter(range(len(steps)))
    tabs = "".join(
        f"<h2>{escape(name)}</h2>{''.join(_tab(next(numbers), step) for step in trace)}"
        for name, trace in traces.items()
    )
    panels = "".join(_panel(i, step) for i, step in enumerate(steps))
    data = json.dumps([_details(step.graph) for step in steps], separators=(",", ":"))
    # Inside a script element only these characters could end the element or start a comment.
    inert = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    legend = "".join(f'<li class="{name}">{text}</li>' for name, text in CATEGORIES.items())
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f'<ul class="legend">{legend}</ul></header>\n'
        f'<nav role="tablist" aria-orientation="vertical">{tabs}</nav>\n<main>{panels}</main>\n'
        '<aside aria-live="polite"><p>Click a node to show its details.</p></aside>\n'
        f'<script type="application/json" id="data">{inert}</script>\n<script>{script}</script></body></html>\n'
    )


def _tab(i: int, step: Step) -> str:
    selected = "true" if i == 0 else "false"
    changes = _changes(step)
    mark = f'<span class="changes">{changes}</span>' if changes else ""
    role = f'role="tab" id="t{i}" aria-controls="g{i}" aria-selected="{selected}"'
    name = escape(step.name).replace("_", "_<wbr>")  # long names break after an underscore
    return f"<button {role}><span>{name}</span>{mark}</button>"


def _changes(step: Step) -> str:
    """The number of nodes before and after a pass; the number of changed ones if it adds and removes none."""
    changed = changed_nodes(step)
    if step.before is None or not (changed or _removed_nodes(step)):
        return ""
    before, after = len(step.before.nodes), len(step.graph.nodes)
    return f"{before} → {after} nodes" if before != after else f"{len(changed)} changed"


def _panel(i: int, step: Step) -> str:
    graph, highlighted = step.graph, changed_nodes(step)
    order = graph.topological_sort()
    index = {node.node_id: k for k, node in enumerate(graph.nodes.values())}
    sections = "".join(
        _section(name, nodes, index, highlighted, is_open=k < OPEN_SECTIONS)
        for k, (name, nodes) in enumerate(_sections(order))
    )
    note = f'<p class="note">{escape(step.note)}</p>' if step.note else ""
    hidden = "" if i == 0 else " hidden"
    return (
        f'<section class="graph" id="g{i}" role="tabpanel" aria-labelledby="t{i}"{hidden}>'
        f"<p>{escape(_summary(graph))}</p>{note}{_chart(graph, index, highlighted)}{_removed(step)}{sections}"
        "</section>\n"
    )


def changed_nodes(step: Step) -> set[str]:
    """The nodes that are new or differ in op, values, attributes, lane, or dependencies other than their operands."""
    if step.before is None:
        return set()
    old = {node_id: _identity(node, step.before) for node_id, node in step.before.nodes.items()}
    return {node_id for node_id, node in step.graph.nodes.items() if old.get(node_id) != _identity(node, step.graph)}


def _identity(node: ExecutionNode, graph: ExecutionGraph) -> tuple[Any, ...]:
    producers = {producer.node_id for ref in node.inputs if (producer := graph.producer(ref)) is not None}
    values = (tuple(node.inputs), tuple(node.outputs), tuple(node.attrs.items()))
    return node.op, *values, node.device_id, node.stream_id, frozenset(node.dependencies - producers)


def _removed_nodes(step: Step) -> list[ExecutionNode]:
    old = step.before.nodes if step.before is not None else {}
    return [node for node_id, node in old.items() if node_id not in step.graph.nodes]


def _removed(step: Step) -> str:
    nodes = _removed_nodes(step)
    if not nodes:
        return ""
    listed = "".join(f"<li>{escape(node.op)} <b>{escape(node.node_id)}</b></li>" for node in nodes[:MAX_REMOVED])
    return f"<details><summary><b>removed</b> <span>{len(nodes)} nodes</span></summary><ul>{listed}</ul></details>"


def _chart(graph: ExecutionGraph, index: Mapping[str, int], highlighted: Collection[str]) -> str:
    drawing = draw_gantt(graph, index, highlighted)
    if not drawing:
        return ""
    return f'<details open><summary><b>time</b></summary><div class="drawing">{drawing}</div></details>'


def _summary(graph: ExecutionGraph) -> str:
    stage = f", {graph.stage}" if graph.stage else ""
    time_us = graph.estimate_total_time()
    estimate = f", {time_us:,.0f} us estimated" if time_us else ""
    return f"{graph.graph_id}: {graph.level} level{stage}, {len(graph.nodes)} nodes{estimate}"


def _section(
    name: str, nodes: Sequence[ExecutionNode], index: Mapping[str, int], highlighted: Collection[str], *, is_open: bool
) -> str:
    time_us = sum(node.estimated_time_us for node in nodes)
    facts = ("1 node" if len(nodes) == 1 else f"{len(nodes)} nodes") + (f", {time_us:,.1f} us" if time_us else "")
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary><b>{escape(name)}</b> <span>{facts}</span></summary>"
        f'<div class="drawing">{draw(nodes, index, highlighted)}</div></details>\n'
    )


def _sections(order: Sequence[ExecutionNode]) -> Iterator[tuple[str, list[ExecutionNode]]]:
    """The nodes by layer; nodes outside of layers are in a first or a last section, before or after layer 0 starts."""
    layers: dict[int | None, list[ExecutionNode]] = {}
    before: list[ExecutionNode] = []
    for node in order:
        if node.layer_id is None and not layers:
            before.append(node)
        else:
            layers.setdefault(node.layer_id, []).append(node)
    after = layers.pop(None, [])
    if before:
        yield ("start" if layers or after else "nodes"), before
    yield from ((f"layer {layer_id}", nodes) for layer_id, nodes in layers.items())
    if after:
        yield "end", after


def _details(graph: ExecutionGraph) -> list[dict[str, Any]]:
    memo: Memo = {}
    return [_node_details(node, graph, memo) for node in graph.nodes.values()]


def _node_details(node: ExecutionNode, graph: ExecutionGraph, memo: Memo) -> dict[str, Any]:
    """The details of a node as label -> text or list of texts; the script omits empty entries."""
    return {
        "node": node.node_id,
        "op": f"{node.op} ({node.op_type.name})",
        "inputs": [str(ref) for ref in node.inputs],
        "outputs": [str(ref) for ref in node.outputs],
        "attributes": [f"{name} = {value}" for name, value in node.attrs.items()],
        "work": _work(node, memo),
        "time": f"{node.estimated_time_us:,.2f} us" if node.estimated_time_us else "",
        "output bytes": f"{node.memory_bytes:,}" if node.memory_bytes else "",
        "layer": "" if node.layer_id is None else str(node.layer_id),
        "block": node.block or "",
        "device, stream": f"{node.device_id}, {node.stream_id}",
        "waits for": sorted(node.dependencies),
        "read by": sorted({user.node_id for ref in node.outputs for user in graph.users(ref)}),
        "spec": node.spec if isinstance(node, OpNode) else "",
        "origins": list(node.origins),
        "metadata": json.dumps(node.metadata, default=str) if node.metadata else "",
    }


def _work(node: ExecutionNode, memo: Memo) -> list[str]:
    if not isinstance(node, OpNode):
        return []
    try:
        return [f"{node.flops(memo=memo)} flops", f"{node.bytes_moved(memo=memo)} bytes moved"]
    except IRError as error:
        return [str(error)]
