"""The page that shows execution graphs in a browser: one file, no network, readable in light and dark."""

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
from sageLLM.runtime.core.ir.op_node import Inference, InferKey, OpNode
from sageLLM.runtime.inspect.drawing import draw
from sageLLM.runtime.inspect.gantt import draw_gantt

CATEGORIES = {
    "attn": "attention",
    "gemm": "linear",
    "norm": "norm",
    "io": "embedding, sampling",
    "comm": "communication",
    "kv": "KV cache",
    "other": "other",
}
OPEN_SECTIONS = 3  # the first ones: what comes before the layers, and a layer or two
MAX_GONE = 200  # nodes that a step took away, as far as they are listed


@dataclass(frozen=True, slots=True)
class Step:
    """A graph to show: after a pass, say. What differs from `before` is lit; `note` tells what was done."""

    name: str
    graph: ExecutionGraph
    before: ExecutionGraph | None = None
    note: str = ""


def to_html(graphs: Sequence[ExecutionGraph] | Mapping[str, ExecutionGraph], title: str = "Execution graphs") -> str:
    """One self-contained HTML page with each graph, by its title or its graph_id. IRError if there is none."""
    named = list(graphs.items()) if isinstance(graphs, Mapping) else [(g.graph_id, g) for g in graphs]
    return to_page({"graphs": [Step(name, graph) for name, graph in named]}, title)


def to_page(traces: Mapping[str, Sequence[Step]], title: str) -> str:
    """One self-contained HTML page: the steps of each trace on the left, their graph beside them.

    A graph is drawn in sections, one for each layer, to fold and unfold, and if its nodes take time, as a chart of its
    streams. What a step changed is lit. A click on a node shows its types, attributes, cost, origins, spec entry, layer
    and stream. The address `#g2/5` opens step 2 and node 5. Every name is escaped. IRError if there is no graph, or one
    has a cycle.
    """
    steps = [step for trace in traces.values() for step in trace]
    if not steps:
        raise IRError("no graph to show")
    numbers = iter(range(len(steps)))
    tabs = "".join(
        f"<h2>{escape(name)}</h2>{''.join(_tab(next(numbers), step) for step in trace)}"
        for name, trace in traces.items()
    )
    panels = "".join(_panel(i, step) for i, step in enumerate(steps))
    data = json.dumps([_details(step.graph) for step in steps], separators=(",", ":"))
    inert = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    legend = "".join(f'<li class="{name}">{text}</li>' for name, text in CATEGORIES.items())
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f'<ul class="legend">{legend}</ul></header>\n'
        f'<nav role="tablist" aria-orientation="vertical">{tabs}</nav>\n<main>{panels}</main>\n'
        '<aside aria-live="polite"><p>Click a node to see what it is.</p></aside>\n'
        f'<script type="application/json" id="data">{inert}</script>\n<script>{script}</script></body></html>\n'
    )


def _tab(i: int, step: Step) -> str:
    selected = "true" if i == 0 else "false"
    gone, lit = _gone(step), changed_nodes(step)
    mark = f'<span class="changes">+{len(lit)} −{len(gone)}</span>' if lit or gone else ""
    role = f'role="tab" id="t{i}" aria-controls="g{i}" aria-selected="{selected}"'
    return f"<button {role}>{escape(step.name)}{mark}</button>"


def _panel(i: int, step: Step) -> str:
    graph, lit = step.graph, changed_nodes(step)
    order = graph.topological_sort()
    index = {node.node_id: k for k, node in enumerate(graph.nodes.values())}
    sections = "".join(
        _section(name, nodes, index, lit, is_open=k < OPEN_SECTIONS) for k, (name, nodes) in enumerate(_sections(order))
    )
    note = f'<p class="note">{escape(step.note)}</p>' if step.note else ""
    hidden = "" if i == 0 else " hidden"
    return (
        f'<section class="graph" id="g{i}" role="tabpanel" aria-labelledby="t{i}"{hidden}>'
        f"<p>{escape(_summary(graph))}</p>{note}{_chart(graph, index, lit)}{_removed(step)}{sections}</section>\n"
    )


def changed_nodes(step: Step) -> set[str]:
    """The nodes that the graph before has not, or has otherwise: as to op, values, attributes, lane, or what they wait
    for besides their operands."""
    if step.before is None:
        return set()
    old = {node_id: _identity(node, step.before) for node_id, node in step.before.nodes.items()}
    return {node_id for node_id, node in step.graph.nodes.items() if old.get(node_id) != _identity(node, step.graph)}


def _identity(node: ExecutionNode, graph: ExecutionGraph) -> tuple[Any, ...]:
    givers = {giver.node_id for ref in node.inputs if (giver := graph.producer(ref)) is not None}
    values = (tuple(node.inputs), tuple(node.outputs), tuple(node.attrs.items()))
    return node.op, *values, node.device_id, node.stream_id, frozenset(node.dependencies - givers)


def _gone(step: Step) -> list[ExecutionNode]:
    return (
        [node for node_id, node in step.before.nodes.items() if node_id not in step.graph.nodes] if step.before else []
    )


def _removed(step: Step) -> str:
    gone = _gone(step)
    if not gone:
        return ""
    listed = "".join(f"<li>{escape(node.op)} <b>{escape(node.node_id)}</b></li>" for node in gone[:MAX_GONE])
    return f"<details><summary><b>taken away</b> <span>{len(gone)} nodes</span></summary><ul>{listed}</ul></details>"


def _chart(graph: ExecutionGraph, index: Mapping[str, int], lit: Collection[str]) -> str:
    drawing = draw_gantt(graph, index, lit)
    if not drawing:
        return ""
    return f'<details open><summary><b>time</b></summary><div class="drawing">{drawing}</div></details>'


def _summary(graph: ExecutionGraph) -> str:
    stage = f", {graph.stage}" if graph.stage else ""
    time_us = graph.estimate_total_time()
    estimate = f", {time_us:,.0f} us estimated" if time_us else ""
    return f"{graph.graph_id}: {graph.level} level{stage}, {len(graph.nodes)} nodes{estimate}"


def _section(
    name: str, nodes: Sequence[ExecutionNode], index: Mapping[str, int], lit: Collection[str], *, is_open: bool
) -> str:
    time_us = sum(node.estimated_time_us for node in nodes)
    facts = ("1 node" if len(nodes) == 1 else f"{len(nodes)} nodes") + (f", {time_us:,.1f} us" if time_us else "")
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary><b>{escape(name)}</b> <span>{facts}</span></summary>"
        f'<div class="drawing">{draw(nodes, index, lit)}</div></details>\n'
    )


def _sections(order: Sequence[ExecutionNode]) -> Iterator[tuple[str, list[ExecutionNode]]]:
    """The nodes by layer; those of no layer stand before the layers or after, by where the first layer begins."""
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
    memo: dict[InferKey, Inference] = {}
    return [_node_details(node, graph, memo) for node in graph.nodes.values()]


def _node_details(node: ExecutionNode, graph: ExecutionGraph, memo: dict[InferKey, Inference]) -> dict[str, Any]:
    """What a click shows, as label -> text or list of texts; empty entries are left out by the script."""
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
        "made from": list(node.origins),
        "metadata": json.dumps(node.metadata, default=str) if node.metadata else "",
    }


def _work(node: ExecutionNode, memo: dict[InferKey, Inference]) -> list[str]:
    if not isinstance(node, OpNode):
        return []
    try:
        return [f"{node.flops(memo=memo)} flops", f"{node.bytes_moved(memo=memo)} bytes moved"]
    except IRError as error:
        return [str(error)]
