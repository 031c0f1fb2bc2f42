"""Gives values whose lifetimes do not meet the same memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from sageLLM.runtime.core.graph import ExecutionGraph
from sageLLM.runtime.core.ir import ExecutionNode, OpNode, TensorRef
from sageLLM.runtime.core.passes.order import Lane, lane
from sageLLM.runtime.core.rewrite import DeclaredPass


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that one value, or several that share it, hold from the position `first` to `last` of the order.

    The positions count every node that may run at the same time as one that needs the values, on any stream.
    """

    names: tuple[str, ...]
    device_id: int
    size: int
    first: int
    last: int

    def meets(self, other: Buffer) -> bool:
        """Whether both are wanted at some time on one device."""
        return self.device_id == other.device_id and self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """An offset per buffer, in bytes from the start of its device's arena.

    `peak_bytes` is the size of the largest arena; no plan can be below `max_live_bytes`.
    """

    buffers: tuple[Buffer, ...] = ()
    offsets: tuple[int, ...] = ()
    _by_name: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        placed = zip(self.buffers, self.offsets, strict=True)
        self._by_name.update((name, offset) for buffer, offset in placed for name in buffer.names)

    def offset(self, name: str) -> int | None:
        """Where a value lies; None for one that is no buffer here, such as an input."""
        return self._by_name.get(name)

    @property
    def peak_bytes(self) -> int:
        return max((o + b.size for b, o in zip(self.buffers, self.offsets, strict=True)), default=0)

    @property
    def total_bytes(self) -> int:
        """What the values would take without sharing."""
        return sum(buffer.size for buffer in self.buffers)

    @property
    def max_live_bytes(self) -> int:
        """The most bytes that are wanted at one time on one device."""
        changes = [(b.device_id, b.first, b.size) for b in self.buffers]
        changes += [(b.device_id, b.last + 1, -b.size) for b in self.buffers]
        most, live, device = 0, 0, -1
        for device_id, _, change in sorted(changes):
            live = change if device_id != device else live + change
            device = device_id
            most = max(most, live)
        return most

    @property
    def reuse_ratio(self) -> float:
        """How many times the arena each byte is used; 1 without any sharing."""
        return self.total_bytes / self.peak_bytes if self.peak_bytes else 1.0

    def check_integrity(self) -> None:
        """Raises ValueError if two buffers that meet overlap."""
        placed = sorted(zip(self.offsets, self.buffers, strict=True), key=lambda item: item[0])
        for i, (offset, buffer) in enumerate(placed):
            for other_offset, other in placed[i + 1 :]:
                if other_offset >= offset + buffer.size:
                    break
                if buffer.meets(other) and other.size:
                    raise ValueError(f"{buffer.names[0]} and {other.names[0]} overlap while both are live")


class MemoryPass(DeclaredPass):
    """Plans an arena per device: every value that a node makes gets an offset, a multiple of `align` bytes.

    Values made in place, and views, lie in the memory that they come from. A value lives from its maker to the last
    node that reads it; nodes on other streams that nothing orders behind that count as running at the same time.
    Buffers get the smallest gap that they fit in, the largest buffers first (Pisarchyk and Lee, 2020); each node's
    `metadata["offsets"]` holds the offsets of its outputs, null for one that lies in an input or a weight. `plan` has
    the whole. Sizes must be bound: a symbolic graph is left as it is.
    """

    align: ClassVar[int] = 256

    def __init__(self) -> None:
        super().__init__()
        self.plan = MemoryPlan()

    def run(self, graph: ExecutionGraph) -> None:
        self.plan = MemoryPlan()
        symbolic = next((r for n in graph.nodes.values() for r in n.outputs if not _is_bound(r)), None)
        if symbolic is not None:
            self.report.facts = {"left": f"the size of {symbolic} is symbolic"}
            return
        self.plan = plan_memory(graph, self.align)
        for node in graph.nodes.values():
            if node.outputs:
                node.metadata["offsets"] = [self.plan.offset(ref.name) for ref in node.outputs]
        facts = ("peak_bytes", "max_live_bytes", "total_bytes", "reuse_ratio")
        self.report.facts = {name: getattr(self.plan, name) for name in facts}


def plan_memory(graph: ExecutionGraph, align: int) -> MemoryPlan:
    """The better of two greedy plans: the largest buffers first, and the longest-lived first."""
    buffers = find_buffers(graph, align)
    largest = place(buffers, sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, buffers[i].first)))
    if largest.peak_bytes == largest.max_live_bytes:
        return largest  # no plan is smaller
    longest = place(buffers, sorted(range(len(buffers)), key=lambda i: (buffers[i].first - buffers[i].last, i)))
    return min(largest, longest, key=lambda plan: plan.peak_bytes)


def place(buffers: list[Buffer], order: Iterable[int]) -> MemoryPlan:
    """Each buffer in turn goes to the smallest gap between those that it meets, or else behind them."""
    offsets: dict[int, int] = {}
    placed: list[tuple[int, Buffer]] = []  # by offset
    for i in order:
        offset = _best_gap(buffers[i], placed)
        offsets[i] = offset
        placed.insert(bisect_right(placed, offset, key=lambda item: item[0]), (offset, buffers[i]))
    return MemoryPlan(tuple(buffers), tuple(offsets[i] for i in range(len(buffers))))


def _best_gap(buffer: Buffer, placed: list[tuple[int, Buffer]]) -> int:
    best, room, end = -1, 0, 0
    for offset, other in placed:
        if other.first > buffer.last or buffer.first > other.last or other.device_id != buffer.device_id:
            continue
        gap = offset - end
        if gap >= buffer.size and (best < 0 or gap < room):
            best, room = end, gap
        end = max(end, offset + other.size)
    return best if best >= 0 else end


def find_buffers(graph: ExecutionGraph, align: int) -> list[Buffer]:
    """The memory that the graph's own values need, with their lifetimes in topological order."""
    order = graph.topological_sort()
    position = {node.node_id: i for i, node in enumerate(order)}
    ends = _Ends(order, position)
    home = _homes(order)
    returned = {ref.name for ref in graph.outputs}
    groups: dict[str, list[TensorRef]] = {}
    for node in order:
        for ref in node.outputs:
            groups.setdefault(home[ref.name], []).append(ref)
    buffers = []
    for root, refs in groups.items():
        maker = graph.producer(root)
        if maker is None or root in graph.inputs or root in graph.weights:
            continue  # made in place in memory that is the caller's
        nodes = {maker.node_id, *(user.node_id for ref in refs for user in graph.users(ref))}
        nodes |= {p.node_id for ref in refs if (p := graph.producer(ref)) is not None}
        last = len(order) if any(ref.name in returned for ref in refs) else ends.last(nodes)
        size = max(-(-ref.num_bytes // align) * align for ref in refs)
        buffers.append(Buffer(tuple(r.name for r in refs), refs[0].device_id, size, position[maker.node_id], last))
    return buffers


def _homes(order: list[ExecutionNode]) -> dict[str, str]:
    """For each value the one whose memory it lies in: itself, or through views and in-place ops another one."""
    home: dict[str, str] = {}
    for node in order:
        for name, ref in zip(_output_names(node), node.outputs, strict=True):
            source = _source(node, name)
            home[ref.name] = ref.name if source is None else home.get(source.name, source.name)
    return home


def _output_names(node: ExecutionNode) -> list[str]:
    return list(node.output_types) if isinstance(node, OpNode) else [ref.name for ref in node.outputs]


def _source(node: ExecutionNode, output: str) -> TensorRef | None:
    """The operand in whose memory an output lies."""
    if not isinstance(node, OpNode):
        return None
    if "view" in node.tags:
        return node.inputs[0]
    return node.optional_input(node.inplace[output]) if output in node.inplace else None


def _is_bound(ref: TensorRef) -> bool:
    return all(isinstance(size, int) for size in ref.shape)


class _Ends:
    """Until when a value must stay, given that each lane runs in order and lanes meet at dependencies alone.

    For each node and lane it knows the first node of the lane that runs after it for certain (a vector clock, as in
    Mattern 1989, seen from the end).
    """

    def __init__(self, order: list[ExecutionNode], position: Mapping[str, int]) -> None:
        self.position = position
        self.lanes: dict[Lane, list[int]] = {}
        for i, node in enumerate(order):
            self.lanes.setdefault(lane(node), []).append(i)
        self.number = {one: k for k, one in enumerate(self.lanes)}
        self.never = len(order)
        self.after: list[list[int]] = [[self.never] * len(self.lanes) for _ in order]
        next_in_lane: dict[Lane, int] = {}
        for i in range(len(order) - 1, -1, -1):
            one = lane(order[i])
            if one in next_in_lane:
                self._join(i, next_in_lane[one], order)
            next_in_lane[one] = i
            for dependency in order[i].dependencies:
                self._join_later(position[dependency], i, order)

    def _join(self, i: int, later: int, order: list[ExecutionNode]) -> None:
        clock, known = self.after[i], self.after[later]
        for k, first in enumerate(known):
            if first < clock[k]:
                clock[k] = first
        k = self.number[lane(order[later])]
        clock[k] = min(clock[k], later)

    def _join_later(self, i: int, later: int, order: list[ExecutionNode]) -> None:
        """The later node's clock is complete: all that follows it was seen before it."""
        self._join(i, later, order)

    def last(self, node_ids: Iterable[str]) -> int:
        """The last position whose node does not run after all of the given nodes for certain."""
        positions = [self.position[node_id] for node_id in node_ids]
        clocks = [self.after[i] for i in positions]
        found = max(positions)
        for k, members in enumerate(self.lanes.values()):
            first = max(clock[k] for clock in clocks)
            here = members[-1] if first == self.never else members[bisect_right(members, first) - 2]
            if first == self.never or bisect_right(members, first) >= 2:
                found = max(found, here)
        return found
