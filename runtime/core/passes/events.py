"""Events between streams: the minimal set of waits of nodes for nodes of other lanes."""

from __future__ import annotations

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.order import lane

WAITS = "waits"
"""Key of a node's metadata: ids of the nodes of other lanes for which it waits."""


def plan_events(graph: ExecutionGraph) -> int:
    """Writes the minimal waits between lanes to the nodes' metadata; returns their number.

    A wait is required for a dependency on another lane that neither the lane's own order nor another wait implies: the
    transitive reduction of the dependencies and the order of every lane (Aho, Garey and Ullman, SIAM J. Comput. 1(2),
    1972). Minimality matters since every wait costs an event record and a stream wait in each step.
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
        # A node starts with the knowledge of its predecessor in the lane.
        known = list(done_before[last[own]]) if last[own] >= 0 else [-1] * len(lanes)
        known[own] = last[own]
        waits: list[str] = []
        if len(lanes) > 1:
            # From the latest dependency back: a wait for it may imply the earlier ones, never the reverse.
            for p in sorted((position[d] for d in node.dependencies), reverse=True):
                if p > known[lane_of[p]]:
                    waits.append(order[p].node_id)
                    known = list(map(max, known, done_before[p]))
                    known[lane_of[p]] = p
        _set_waits(node.metadata, waits)
        num_waits += len(waits)
        done_before.append(known)
        last[own] = i
    return num_waits


def _set_waits(metadata: dict[str, object], waits: list[str]) -> None:
    if waits:
        metadata[WAITS] = waits
    else:
        metadata.pop(WAITS, None)
