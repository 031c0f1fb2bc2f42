"""Export of graph timelines in the Trace Event Format, for Perfetto and chrome://tracing.

A graph is a process, a stream of a device a thread, a node a complete event. Times are microseconds, as in the format
(Google, "Trace Event Format", 2016).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.order import lane, time_spans

Times = Mapping[str, float]


def to_chrome_trace(graphs: Mapping[str, tuple[ExecutionGraph, Times | None]]) -> str:
    """JSON of timelines by name; each is a graph with the measured microseconds of its nodes, or None for estimates."""
    events = [event for i, (name, run) in enumerate(graphs.items()) for event in _events(i, name, *run)]
    return json.dumps({"displayTimeUnit": "ns", "traceEvents": events}, separators=(",", ":"))


def _events(process: int, name: str, graph: ExecutionGraph, times_us: Times | None) -> Iterator[dict[str, Any]]:
    lanes = {one: i for i, one in enumerate(sorted({lane(node) for node in graph.nodes.values()}))}
    yield _named("process_name", process, 0, name)
    for (device, stream), thread in lanes.items():
        yield _named("thread_name", process, thread, f"device {device}, stream {stream}")
    for node_id, (start, end) in time_spans(graph.topological_sort(), times_us).items():
        node = graph.nodes[node_id]
        args = {"node": node_id, "outputs": [str(ref) for ref in node.outputs], "origins": list(node.origins)}
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


def _named(event: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": event, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
