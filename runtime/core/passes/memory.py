"""Gives values whose lifetimes do not meet the same memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.lifetimes import Buffer, Lifetimes, Sizes

OFFSETS = "offsets"
"""The key of a node's metadata under which the places of its outputs stand."""
MOMENTS = 8
"""Moments at which the lower bound is looked for."""
MAX_ATTEMPTS = 200
ATTEMPTS_PER_START = 10
MAX_PLACED = 8000
"""Plans that are tried, those from one start, and buffers that are placed in all, while the best is above the bound."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """An offset per buffer, in bytes from the start of its device's arena.

    `peak_bytes` is the size of the largest arena; no plan can be below `max_live_bytes`. `source` names, for a value in
    the memory of another one (a view of it, or made in place), that other.
    """

    buffers: tuple[Buffer, ...] = ()
    offsets: tuple[int, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)
    _by_name: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        placed = zip(self.buffers, self.offsets, strict=True)
        self._by_name.update((name, offset) for buffer, offset in placed for name in buffer.names)

    def offset(self, name: str) -> int | None:
        """Where the buffer of a value begins; None for one that has none here, such as an input.

        A view may begin further on in the buffer, as its op says.
        """
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
        return max_live_bytes(self.buffers)

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

    Each node's `metadata["offsets"]` holds the offsets of its outputs, null for one that lies in an input or a weight.
    `plan` has the whole; see `plan_memory`. Sizes must be bound: a symbolic graph is left as it is.
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
        self.plan = plan_memory(graph, align=self.align)
        for node in graph.nodes.values():
            if node.outputs:
                node.metadata[OFFSETS] = [self.plan.offset(ref.name) for ref in node.outputs]
        facts = ("peak_bytes", "max_live_bytes", "total_bytes", "reuse_ratio")
        self.report.facts = {name: getattr(self.plan, name) for name in facts}


def plan_memory(graph: ExecutionGraph | Lifetimes, sizes: Sizes | None = None, align: int = 256) -> MemoryPlan:
    """A place for every value that the graph makes; `sizes` gives those that are symbolic.

    Values made in place, and views, lie in the memory that they come from. A value lives from its maker to the last
    node that reads it, and one that the graph returns lives on; nodes on other lanes that nothing orders behind the
    readers count as running at the same time. Whoever plans for many sizes gives the graph's `Lifetimes`. Sizes that
    grow with the step make a plan for the largest step valid for every smaller one.
    """
    lifetimes = graph if isinstance(graph, Lifetimes) else Lifetimes(graph)
    plan = plan_buffers(lifetimes.buffers(sizes or {}, align))
    return MemoryPlan(plan.buffers, plan.offsets, lifetimes.source)


def plan_buffers(buffers: Sequence[Buffer]) -> MemoryPlan:
    """The best of some greedy plans: large buffers first (Pisarchyk and Lee, 2020), long-lived ones first, by time.

    Where none of them reaches the lower bound, what stands above it is placed first, and all others anew; the draws are
    the same in every run.
    """
    beside = find_beside(buffers)
    bound = max_live_bytes(buffers)
    best = MemoryPlan(tuple(buffers), tuple(place(buffers, beside, _by_size(buffers))))
    for order in (_by_length(buffers), range(len(buffers))):
        if best.peak_bytes > bound:
            other = MemoryPlan(best.buffers, tuple(place(buffers, beside, order)))
            best = min(best, other, key=lambda plan: plan.peak_bytes)
    return best if best.peak_bytes <= bound else _improved(best, beside, bound)


def place(buffers: Sequence[Buffer], beside: Sequence[Sequence[int]], order: Iterable[int]) -> list[int]:
    """Each buffer in turn goes to the smallest gap between those beside it, or else behind them."""
    offsets = [-1] * len(buffers)
    for i in order:
        taken = sorted((offsets[j], buffers[j].size) for j in beside[i] if offsets[j] >= 0)
        offsets[i] = _best_gap(buffers[i].size, taken)
    return offsets


def find_beside(buffers: Sequence[Buffer]) -> list[list[int]]:
    """For each buffer those that it meets, found by going along the order of the nodes."""
    beside: list[list[int]] = [[] for _ in buffers]
    live: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: buffers[i].first):
        _, device_id, _, first, _, lane, _ = buffers[i]
        live = [j for j in live if buffers[j].last >= first]
        for j in live:
            after = buffers[j].after
            if buffers[j].device_id == device_id and not (after and first >= after[lane]):
                beside[i].append(j)
                beside[j].append(i)
        live.append(i)
    return beside


def max_live_bytes(buffers: Sequence[Buffer]) -> int:
    """A lower bound of every plan: the largest sum of buffers of a device that meet one another.

    It is looked for where most is live. On one lane all that is live at a time meets; on several a greedy choice is
    made, also at moments apart from those, which may miss the largest sum.
    """
    most = 0
    sizes = _live_sizes(buffers)
    moments = heapq.nlargest(MOMENTS, sizes)
    if any(buffer.after for buffer in buffers):
        moments += sizes[:: len(sizes) // (4 * MOMENTS) + 1]
    for size, device_id, position in moments:
        if size > most:
            live = [b for b in buffers if b.device_id == device_id and b.first <= position <= b.last]
            most = max(most, _meeting_bytes(live))
    return most


def _live_sizes(buffers: Sequence[Buffer]) -> list[tuple[int, int, int]]:
    """(bytes, device, position) whenever a buffer is made: how much of the device's memory may be in use."""
    changes = [(b.device_id, b.first, b.size) for b in buffers]
    changes += [(b.device_id, b.last + 1, -b.size) for b in buffers]
    live, device, sizes = 0, -1, []
    for device_id, position, change in sorted(changes):
        live = change if device_id != device else live + change
        device = device_id
        sizes.append((live, device_id, position))
    return sizes


def _meeting_bytes(buffers: list[Buffer]) -> int:
    meeting: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda one: -one.size):
        if all(buffer.meets(other) for other in meeting):
            meeting.append(buffer)
    return sum(buffer.size for buffer in meeting)


def _best_gap(size: int, taken: list[tuple[int, int]]) -> int:
    best, room, end = -1, 0, 0
    for offset, other_size in taken:
        gap = offset - end
        if gap >= size and (best < 0 or gap < room):
            best, room = end, gap
        end = max(end, offset + other_size)
    return best if best >= 0 else end


def _by_size(buffers: Sequence[Buffer]) -> list[int]:
    return sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, buffers[i].first))


def _by_length(buffers: Sequence[Buffer]) -> list[int]:
    return sorted(range(len(buffers)), key=lambda i: (buffers[i].first - buffers[i].last, i))


def _improved(best: MemoryPlan, beside: list[list[int]], bound: int) -> MemoryPlan:
    """Again and again places some of what stands above the bound first, in random order; now and then everything."""
    random, buffers, offsets = Random(0), best.buffers, best.offsets
    order = sorted(range(len(buffers)), key=lambda i: (offsets[i], -buffers[i].size))
    for attempt in range(1, min(MAX_ATTEMPTS, MAX_PLACED // len(buffers) + 1) + 1):
        above = [i for i in order if offsets[i] + buffers[i].size > bound]
        first = [i for i in above if random.random() < 0.5] or above
        if attempt % ATTEMPTS_PER_START == 0:
            first = list(order)
        random.shuffle(first)
        chosen = set(first)
        order = [*first, *(i for i in order if i not in chosen)]
        offsets = tuple(place(buffers, beside, order))
        best = min(best, MemoryPlan(buffers, offsets), key=lambda plan: plan.peak_bytes)
        if best.peak_bytes <= bound:
            break
    return best


def _is_bound(ref: TensorRef) -> bool:
    return all(isinstance(size, int) for size in ref.shape)
