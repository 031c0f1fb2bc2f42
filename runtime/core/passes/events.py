"""The events between streams: which node waits for which one of another lane, and no more than that."""

from __future__ import annotations

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.passes.order import lane

WAITS = "waits"
"""The key of a node's metadata under which the nodes of other lanes stand whose events it waits for."""


def plan_events(graph: ExecutionGraph) -> int:
    """Notes the minimal waits between lanes in the nodes' metadata; gives their number.

    A wait is needed for a dependency on another lane that neither the lane's own order nor another wait implies: the
    transitive reduction of the dependencies and the order of every lane (Aho, Garey and Ullman, 1972).
    """
    order = graph.topological_sort()
    position = {node.node_id: i for i, node in enumerate(order)}
    lanes = {one: k for k, one in enumerate(dict.fromkeys(map(lane, order)))}
    lane_of = [lanes[lane(node)] for node in order]
    last = [-1] * len(lanes)
    done_before: list[list[int]] = []  # by node and lane: the last position that is surely done when the node starts
    num_waits = 0
    for i, node in enumerate(order):
        own = lane_of[i]
        known = list(done_before[last[own]]) if last[own] >= 0 else [-1] * len(lanes)
        known[own] = last[own]
        waits: list[str] = []
        if len(lanes) > 1:
            for p in sorted((position[d] for d in node.dependencies), reverse=True):
                if p > known[lane_of[p]]:
                    waits.append(order[p].node_id)
                    known = list(map(max, known, done_before[p]))
                    known[lane_of[p]] = p
        _note(node.metadata, waits)
        num_waits += len(waits)
        done_before.append(known)
        last[own] = i
    return num_waits


def _note(metadata: dict[str, object], waits: list[str]) -> None:
    if waits:
        metadata[WAITS] = waits
    else:
        metadata.pop(WAITS, None)
