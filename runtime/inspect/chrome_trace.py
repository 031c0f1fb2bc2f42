"""Export of graph timelines in the Trace Event Format, for Perfetto and chrome://tracing.

A graph is a process, a stream of a device a thread, a node a complete event, and a wait for a node of another stream a
flow between the two. Times are microseconds, as in the format (Google, "Trace Event Format", 2016).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.order import Lane, Span, lane, time_spans
from sageLLM.runtime.core.passes.events import WAITS

Spans = Mapping[str, Span]


def to_chrome_trace(graphs: Mapping[str, tuple[ExecutionGraph, Spans | None]]) -> str:
    """JSON of timelines by name; each is a graph with the measured spans of its nodes, or None for the planned ones.

    Each node has the planned times among its arguments, and the measured ones if there are any.
    """
    events = [event for i, (name, run) in enumerate(graphs.items()) for event in _events(i, name, *run)]
    return json.dumps({"displayTimeUnit": "ns", "traceEvents": events}, separators=(",", ":"))


def _events(process: int, name: str, graph: ExecutionGraph, measured: Spans | None) -> Iterator[dict[str, Any]]:
    lanes = {one: i for i, one in enumerate(sorted({lane(node) for node in graph.nodes.values()}))}
    yield _named("process_name", process, 0, name)
    for (device, stream), thread in lanes.items():
        yield _named("thread_name", process, thread, f"device {device}, stream {stream}")
    planned = time_spans(graph.topological_sort())
    spans = planned if measured is None else measured
    yield from _flows(process, graph, spans, lanes)
    for node_id, (start, end) in spans.items():
        node = graph.nodes[node_id]
        args: dict[str, Any] = {
            "node": node_id,
            "outputs": [str(ref) for ref in node.outputs],
            "origins": list(node.origins),
        }
        args |= _times("planned", planned[node_id])
        if measured is not None:
            args |= _times("measured", measured[node_id])
        if isinstance(node, OpNode):
            args["spec"] = node.spec
        yield {
            "name": node.op,
            "cat": node.op_type.name.lower(),
            "ph": "X",
            "pid": process,
            "tid": lanes[lane(node)],
            "ts": start,
            "dur": end - start,
            "args": args,
        }


def _times(name: str, span: Span) -> dict[str, float]:
    return {f"{name}_start_us": span.start_us, f"{name}_us": span.end_us - span.start_us}


def _flows(process: int, graph: ExecutionGraph, spans: Spans, lanes: Mapping[Lane, int]) -> Iterator[dict[str, Any]]:
    """The waits between streams, each from the end of a node to the beginning of that which waits for it."""
    waits = [(node, graph.nodes[name]) for node in graph.nodes.values() for name in node.metadata.get(WAITS, ())]
    for number, (node, awaited) in enumerate(waits):
        ends = ("s", awaited, spans[awaited.node_id].end_us), ("f", node, spans[node.node_id].start_us)
        for kind, one, moment in ends:
            event = {"name": "wait", "cat": "wait", "ph": kind, "id": f"{process}.{number}", "pid": process}
            yield {**event, "tid": lanes[lane(one)], "ts": moment, "bp": "e"}


def _named(event: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": event, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
