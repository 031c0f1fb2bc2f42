"""Verifier of scheduled and placed graphs, from the graph alone.

`core.ir.verify` checks that a graph is well-formed; these rules check that it can run on several streams and devices
with one arena each: that no order, wait or memory location depends on timing.
"""

from __future__ import annotations

from collections.abc import Iterator

from sageLLM.runtime.core.errors import VerifyError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.passes.clocks import Clocks
from sageLLM.runtime.core.passes.effects import writes_caches
from sageLLM.runtime.core.passes.events import WAITS
from sageLLM.runtime.core.passes.lifetimes import Lifetimes
from sageLLM.runtime.core.passes.memory import OFFSETS, MemoryPlan


def verify_schedule(graph: ExecutionGraph) -> None:
    """Raises VerifyError with all problems of a well-formed graph: see the functions below."""
    clocks = Clocks(graph.topological_sort())
    problems = [
        *find_lost_waits(graph),
        *find_races(graph, clocks),
        *find_unordered_collectives(clocks),
        *find_unpaired_transfers(graph),
        *find_overlaps(graph),
    ]
    if problems:
        raise VerifyError(problems)


def find_lost_waits(graph: ExecutionGraph) -> Iterator[str]:
    """Dependencies that neither the order of a lane nor the planned waits keep; empty if no waits are planned."""
    order = graph.topological_sort()
    waits = [node.metadata.get(WAITS, []) for node in order]
    if not any(waits):
        return
    clocks = Clocks(order, waits)
    for i, node in enumerate(order):
        for dependency in sorted(node.dependencies):
            if not clocks.runs_after(i, clocks.position[dependency]):
                yield f"{node.node_id}: may start before {dependency} is done: no event orders them"


def find_races(graph: ExecutionGraph, clocks: Clocks) -> Iterator[str]:
    """Pairs of accesses to a cache, at least one a write, that may happen at the same time."""
    accesses: dict[str, list[tuple[int, bool]]] = {}
    for i, node in enumerate(clocks.order):
        for name in dict.fromkeys(ref.name for ref in node.inputs if ref.name in graph.inputs):
            accesses.setdefault(name, []).append((i, writes_caches(node)))
    for name, found in accesses.items():
        writers = [i for i, writes in found if writes]
        for writer in writers:
            for other, writes in found:
                is_pair = other != writer and (other > writer or not writes)
                first, second = sorted((writer, other))
                if is_pair and not clocks.runs_after(second, first):
                    ids = clocks.order[first].node_id, clocks.order[second].node_id
                    yield f"{ids[1]}: uses {name!r} at the same time as {ids[0]}, and one of them writes it"


def find_unordered_collectives(clocks: Clocks) -> Iterator[str]:
    """Collectives of one group and device without an order: ranks might start them in different orders and hang."""
    last: dict[tuple[int, str], int] = {}
    for i, node in enumerate(clocks.order):
        if not node.op_type.is_comm or _peer(node) is not None:
            continue
        key = node.device_id, _group(node)
        before = last.get(key)
        if before is not None and not clocks.runs_after(i, before):
            yield f"{node.node_id}: not ordered with {clocks.order[before].node_id}, a collective of the same group"
        last[key] = i


def find_unpaired_transfers(graph: ExecutionGraph) -> Iterator[str]:
    """Sends between two devices that are received in a different order, or not at all: channels match by order."""
    sent: dict[tuple[int, int, str], list[str]] = {}
    received: dict[tuple[int, int, str], list[str]] = {}
    for node in graph.topological_sort():
        peer = _peer(node)
        if peer is None:
            continue
        if node.op_type.name == "COMM_SEND":
            sent.setdefault((node.device_id, peer, _group(node)), []).append(node.outputs[0].name)
        else:
            received.setdefault((peer, node.device_id, _group(node)), []).append(node.inputs[0].name)
    for key in dict.fromkeys([*sent, *received]):
        if sent.get(key) != received.get(key):
            yield f"device {key[0]} sends to {key[1]} {sent.get(key, [])}, which receives {received.get(key, [])}"


def find_overlaps(graph: ExecutionGraph) -> Iterator[str]:
    """Values that overlap in memory and may be live at the same time, if the graph has planned offsets."""
    found: dict[str, int] = {}
    for node in graph.nodes.values():
        offsets = node.metadata.get(OFFSETS, [])
        found |= {ref.name: offset for ref, offset in zip(node.outputs, offsets, strict=False) if offset is not None}
    if not found or not all(ref.is_bound for node in graph.nodes.values() for ref in node.outputs):
        return
    buffers = [b for b in Lifetimes(graph).buffers({}, 1) if b.names[0] in found]
    try:
        MemoryPlan(tuple(buffers), tuple(found[buffer.names[0]] for buffer in buffers)).check_integrity()
    except ValueError as error:
        yield str(error)


def _group(node: ExecutionNode) -> str:
    return str(node.attrs.get("group", node.metadata.get("group")))


def _peer(node: ExecutionNode) -> int | None:
    peer = node.attrs.get("peer")
    is_transfer = node.op_type.name in ("COMM_SEND", "COMM_RECV")
    return peer if is_transfer and isinstance(peer, int) else None
