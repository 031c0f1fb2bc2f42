"""The page that shows execution graphs in a browser: one file, no network, readable in light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from sageLLM.runtime.core.drawing import draw
from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.graph import ExecutionGraph
from sageLLM.runtime.core.ir import ExecutionNode, Inference, InferKey, OpNode

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


def to_html(graphs: Sequence[ExecutionGraph] | Mapping[str, ExecutionGraph], title: str = "Execution graphs") -> str:
    """One self-contained HTML page with a tab for each graph, by its title or its graph_id.

    A graph is drawn in sections, one for each layer, to fold and unfold; a click on a node shows its types, attributes,
    cost, origins, spec entry, layer and stream. Every name is escaped. IRError if there is no graph or one has a cycle.
    """
    named = list(graphs.items()) if isinstance(graphs, Mapping) else [(g.graph_id, g) for g in graphs]
    if not named:
        raise IRError("no graph to show")
    tabs = "".join(_tab(i, name) for i, (name, _) in enumerate(named))
    panels = "".join(_panel(i, graph) for i, (_, graph) in enumerate(named))
    data = json.dumps([_details(graph) for _, graph in named], separators=(",", ":"))
    inert = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    legend = "".join(f'<li class="{name}">{text}</li>' for name, text in CATEGORIES.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f'<nav role="tablist">{tabs}</nav><ul class="legend">{legend}</ul></header>\n<main>{panels}</main>\n'
        '<aside aria-live="polite"><p>Click a node to see what it is.</p></aside>\n'
        f'<script type="application/json" id="data">{inert}</script>\n<script>{_SCRIPT}</script></body></html>\n'
    )


def _tab(i: int, name: str) -> str:
    selected = "true" if i == 0 else "false"
    return f'<button role="tab" id="t{i}" aria-controls="g{i}" aria-selected="{selected}">{escape(name)}</button>'


def _panel(i: int, graph: ExecutionGraph) -> str:
    order = graph.topological_sort()
    index = {node.node_id: k for k, node in enumerate(graph.nodes.values())}
    sections = "".join(
        _section(name, nodes, index, is_open=k < OPEN_SECTIONS) for k, (name, nodes) in enumerate(_sections(order))
    )
    hidden = "" if i == 0 else " hidden"
    return (
        f'<section class="graph" id="g{i}" role="tabpanel" aria-labelledby="t{i}"{hidden}>'
        f"<p>{escape(_summary(graph))}</p>{sections}</section>\n"
    )


def _summary(graph: ExecutionGraph) -> str:
    stage = f", {graph.stage}" if graph.stage else ""
    time_us = graph.estimate_total_time()
    estimate = f", {time_us:,.0f} us estimated" if time_us else ""
    return f"{graph.graph_id}: {graph.level} level{stage}, {len(graph.nodes)} nodes{estimate}"


def _section(name: str, nodes: Sequence[ExecutionNode], index: Mapping[str, int], *, is_open: bool) -> str:
    time_us = sum(node.estimated_time_us for node in nodes)
    facts = ("1 node" if len(nodes) == 1 else f"{len(nodes)} nodes") + (f", {time_us:,.1f} us" if time_us else "")
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary><b>{escape(name)}</b> <span>{facts}</span></summary>"
        f'<div class="drawing">{draw(nodes, index)}</div></details>\n'
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


_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1c2128;--soft:#5c6670;--line:#d0d7de;--edge:#9aa4ae;--card:#f6f8fa;
--attn:#c2571a;--gemm:#2563c9;--norm:#6f42c1;--io:#25803c;--comm:#c22f4f;--kv:#0b7f83;--other:#6a737d}
@media(prefers-color-scheme:dark){:root{--back:#0f1318;--text:#e4e8ec;--soft:#98a2ad;--line:#2b333c;--edge:#56616d;
--card:#171d24;--attn:#f0935a;--gemm:#6ea3f7;--norm:#b794f4;--io:#63c47b;--comm:#f47893;--kv:#4cc4c8;--other:#98a2ad}}
*{box-sizing:border-box}[hidden]{display:none}
body{margin:0;background:var(--back);color:var(--text);font:14px/1.45 system-ui,sans-serif;display:grid;
grid-template:auto 1fr/minmax(0,1fr) 340px;height:100vh}
header{grid-column:1/3;padding:10px 18px;border-bottom:1px solid var(--line)}
h1{font-size:17px;margin:0 0 6px}nav{display:flex;flex-wrap:wrap;gap:6px}
button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:3px 12px;cursor:pointer}button[aria-selected=true]{border-color:var(--gemm);color:var(--gemm);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:14px;list-style:none;margin:8px 0 0;padding:0;color:var(--soft);font-size:12px}
.legend li::before{content:"";display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px;
background:var(--c)}
.attn{--c:var(--attn)}.gemm{--c:var(--gemm)}.norm{--c:var(--norm)}.io{--c:var(--io)}.comm{--c:var(--comm)}
.kv{--c:var(--kv)}.other{--c:var(--other)}
main{overflow:auto;padding:8px 18px 40px}main p,summary span{color:var(--soft)}
details{border:1px solid var(--line);border-radius:8px;margin:8px 0}summary{padding:6px 12px;cursor:pointer}
.drawing{overflow-x:auto;border-top:1px solid var(--line);padding:4px}svg{display:block;margin:0 auto}
.node{cursor:pointer;outline:none}.node rect{fill:var(--card);stroke:var(--c);stroke-width:1.4}
.node:hover rect,.node:focus rect,.node.chosen rect{stroke-width:3}.node text{fill:var(--text);font-size:12px}
.node .op{fill:var(--c);font-weight:600}.node .id{fill:var(--soft);font-size:11px}
.edge{fill:none;stroke:var(--edge);stroke-width:1.3}.stub{stroke-dasharray:2 2}
aside{border-left:1px solid var(--line);overflow:auto;padding:12px 16px;background:var(--card)}
aside p{color:var(--soft)}dl{margin:0}dt{color:var(--soft);font-size:12px;margin-top:9px}
dd{margin:0;font:12px/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
@media(max-width:760px){body{grid-template:auto 1fr 40vh/1fr}header{grid-column:1}
aside{border-left:0;border-top:1px solid var(--line)}}
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = [...document.querySelectorAll("[role=tabpanel]")];
const aside = document.querySelector("aside");
tabs.forEach((tab, i) => tab.addEventListener("click", () => {
  tabs.forEach((t, k) => t.setAttribute("aria-selected", k === i));
  panels.forEach((p, k) => { p.hidden = k !== i; });
}));
function show(node) {
  document.querySelectorAll(".chosen").forEach(n => n.classList.remove("chosen"));
  node.classList.add("chosen");
  const list = document.createElement("dl");
  const facts = data[panels.indexOf(node.closest("[role=tabpanel]"))][node.dataset.i];
  for (const [label, value] of Object.entries(facts)) {
    const lines = [].concat(value).filter(line => line !== "");
    if (!lines.length) continue;
    list.appendChild(document.createElement("dt")).textContent = label;
    for (const line of lines) list.appendChild(document.createElement("dd")).textContent = line;
  }
  aside.replaceChildren(list);
}
document.querySelectorAll(".node").forEach(node => {
  node.addEventListener("click", () => show(node));
  node.addEventListener("keydown", event => { if (event.key === "Enter") show(node); });
});
"""
