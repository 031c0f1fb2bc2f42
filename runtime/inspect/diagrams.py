"""Export of execution graphs as Mermaid for documents and as DOT for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode


def to_mermaid(graph: ExecutionGraph) -> str:
    """A Mermaid flowchart, top down: nodes with op and id, the nodes of a layer in a box, an arrow per dependency."""
    number = {node_id: f"n{i}" for i, node_id in enumerate(graph.nodes)}
    lines = ["flowchart TD"]
    for layer_id, nodes in _by_layer(graph):
        shapes = [f'{number[n.node_id]}["{_mermaid(n.op)}<br/>{_mermaid(n.node_id)}"]' for n in nodes]
        if layer_id is None:
            lines += [f"  {shape}" for shape in shapes]
        else:
            head = f'  subgraph s{number[nodes[0].node_id]}["layer {layer_id}"]'
            lines += [head, *(f"    {shape}" for shape in shapes), "  end"]
    lines += [f"  {number[a]} --> {number[b]}" for a, b in _edges(graph)]
    return "\n".join(lines) + "\n"


def to_dot(graph: ExecutionGraph) -> str:
    """A Graphviz digraph: nodes with op and id, the nodes of a layer in a cluster, an edge per dependency."""
    lines = [f"digraph {_dot(graph.graph_id)} {{", "  node [shape=box];"]
    for i, (layer_id, nodes) in enumerate(_by_layer(graph)):
        shapes = [f"{_dot(n.node_id)} [label={_dot(n.op + chr(10) + n.node_id)}];" for n in nodes]
        if layer_id is None:
            lines += [f"  {shape}" for shape in shapes]
        else:
            lines += [f"  subgraph cluster_{i} {{", f'    label="layer {layer_id}";']
            lines += [*(f"    {shape}" for shape in shapes), "  }"]
    lines += [f"  {_dot(a)} -> {_dot(b)};" for a, b in _edges(graph)]
    return "\n".join([*lines, "}"]) + "\n"


def _by_layer(graph: ExecutionGraph) -> Iterator[tuple[int | None, list[ExecutionNode]]]:
    """Runs of consecutive nodes of one layer, in the graph's order."""
    run: list[ExecutionNode] = []
    for node in graph.nodes.values():
        if run and run[0].layer_id != node.layer_id:
            yield run[0].layer_id, run
            run = []
        run.append(node)
    if run:
        yield run[0].layer_id, run


def _edges(graph: ExecutionGraph) -> Iterator[tuple[str, str]]:
    position = {node_id: i for i, node_id in enumerate(graph.nodes)}
    for node in graph.nodes.values():
        known = (dependency for dependency in node.dependencies if dependency in position)
        yield from ((dependency, node.node_id) for dependency in sorted(known, key=position.__getitem__))


def _mermaid(text: str) -> str:
    """Text with all characters but letters, digits and a few signs as entity codes, which Mermaid displays."""
    return "".join(c if c.isascii() and (c.isalnum() or c in " ._-") else f"#{ord(c)};" for c in text)


def _dot(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
