"""Memory planning: values with disjoint lifetimes share memory in one arena per device."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.lifetimes import Buffer, Lifetimes, Sizes

OFFSETS = "offsets"
"""Key of a node's metadata: the arena offsets of its outputs."""
NUM_MOMENTS = 8
"""Moments of the step at which the lower bound is computed."""
MAX_ATTEMPTS = 200
ATTEMPTS_PER_START = 10
MAX_PLACED = 8000
"""Limits of the random search while the best plan is above the bound: plans in all, plans before a restart, and
buffers placed in all, which bounds the time for large graphs."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """An offset per buffer, in bytes from the start of its device's arena.

    `peak_bytes` is the size of the largest arena; no plan can be smaller than `max_live_bytes`. `source` maps a value
    in the memory of another one (a view of it, or computed in place) to the name of that value.
    """

    buffers: tuple[Buffer, ...] = ()
    offsets: tuple[int, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)
    _by_name: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        placed = zip(self.buffers, self.offsets, strict=True)
        self._by_name.update((name, offset) for buffer, offset in placed for name in buffer.names)

    def offset(self, name: str) -> int | None:
        """The offset of a value's buffer; None for a value without a buffer, such as an input.

        A view may start later in the buffer, as its op defines.
        """
        return self._by_name.get(name)

    @property
    def peak_bytes(self) -> int:
        return max((o + b.size for b, o in zip(self.buffers, self.offsets, strict=True)), default=0)

    @property
    def total_bytes(self) -> int:
        """The bytes of all buffers without sharing."""
        return sum(buffer.size for buffer in self.buffers)

    @property
    def max_live_bytes(self) -> int:
        """The largest number of bytes live at one time on one device."""
        return max_live_bytes(self.buffers)

    @property
    def reuse_ratio(self) -> float:
        """The average number of buffers per byte of the arena; 1 without sharing."""
        return self.total_bytes / self.peak_bytes if self.peak_bytes else 1.0

    def check_integrity(self) -> None:
        """Raises ValueError if two buffers that interfere overlap in memory."""
        placed = sorted(zip(self.offsets, self.buffers, strict=True), key=lambda item: item[0])
        for i, (offset, buffer) in enumerate(placed):
            for other_offset, other in placed[i + 1 :]:
                if other_offset >= offset + buffer.size:
                    break
                if buffer.interferes_with(other) and other.size:
                    raise ValueError(f"{buffer.names[0]} and {other.names[0]} overlap while both are live")


class MemoryPass(DeclaredPass):
    """Plans an arena per device: every value that a node produces receives an offset, a multiple of `align` bytes.

    Each node's `metadata["offsets"]` contains the offsets of its outputs, null for one in the memory of an input or a
    weight. `plan` is the complete plan; see `plan_memory`. Sizes must be bound: a symbolic graph is not changed.
    """

    align: ClassVar[int] = 256

    def __init__(self) -> None:
        super().__init__()
        self.plan = MemoryPlan()

    def run(self, graph: ExecutionGraph) -> None:
        self.plan = MemoryPlan()
        symbolic = next((r for n in graph.nodes.values() for r in n.outputs if not r.is_bound), None)
        if symbolic is not None:
            self.report.facts = {"skipped": f"the size of {symbolic} is symbolic"}
            return
        self.plan = plan_memory(graph, align=self.align)
        for node in graph.nodes.values():
            if node.outputs:
                node.metadata[OFFSETS] = [self.plan.offset(ref.name) for ref in node.outputs]
        facts = ("peak_bytes", "max_live_bytes", "total_bytes", "reuse_ratio")
        self.report.facts = {name: getattr(self.plan, name) for name in facts}


def plan_memory(graph: ExecutionGraph | Lifetimes, sizes: Sizes | None = None, align: int = 256) -> MemoryPlan:
    """An offset for every value that the graph produces; `sizes` binds symbolic sizes.

    Views and values computed in place use the memory of their source. A value is live from its producer to its last
    user, and to the end of the step if the graph returns it; nodes on other lanes that are not ordered after the users
    count as running at the same time. To plan for many sizes, pass the graph's `Lifetimes`. If sizes grow with the
    step, the plan of the largest step is valid for every smaller one.
    """
    lifetimes = graph if isinstance(graph, Lifetimes) else Lifetimes(graph)
    plan = plan_buffers(lifetimes.buffers(sizes or {}, align))
    return MemoryPlan(plan.buffers, plan.offsets, lifetimes.source)


def plan_buffers(buffers: Sequence[Buffer]) -> MemoryPlan:
    """The best of three greedy plans, improved by a random search if none reaches the lower bound.

    Optimal placement is NP-hard. Placing large buffers first is at or near the bound for most networks (Pisarchyk and
    Lee, Efficient Memory Management for Deep Neural Net Inference, arXiv 2001.03288); by lifetime or in program order
    wins where many buffers have one size. Each plan costs one pass over the interference lists, so the others are
    tried only while the best is above the bound. The search draws the same numbers in every run.
    """
    interference = find_interference(buffers)
    bound = max_live_bytes(buffers)
    best = MemoryPlan(tuple(buffers), tuple(assign_offsets(buffers, interference, _by_size(buffers))))
    for order in (_by_length(buffers), range(len(buffers))):
        if best.peak_bytes > bound:
            other = MemoryPlan(best.buffers, tuple(assign_offsets(buffers, interference, order)))
            best = min(best, other, key=lambda plan: plan.peak_bytes)
    return best if best.peak_bytes <= bound else _improve(best, interference, bound)


def assign_offsets(buffers: Sequence[Buffer], interference: Sequence[Sequence[int]], order: Iterable[int]) -> list[int]:
    """Assigns each buffer, in `order`, to the smallest gap between the placed buffers that it interferes with.

    Without a gap that fits it follows the last of them.
    """
    placed: dict[int, int] = {}
    for i in order:
        taken = sorted((placed[j], buffers[j].size) for j in interference[i] if j in placed)
        placed[i] = _best_gap(buffers[i].size, taken)
    return [placed[i] for i in range(len(buffers))]


def find_interference(buffers: Sequence[Buffer]) -> list[list[int]]:
    """For each buffer the indices of those that interfere with it, by a sweep over the order of the nodes."""
    interference: list[list[int]] = [[] for _ in buffers]
    live: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: buffers[i].first):
        # `interferes_with` written out: this loop is quadratic in the live buffers and dominates planning.
        _, device_id, _, first, _, lane, _ = buffers[i]
        live = [j for j in live if buffers[j].last >= first]
        for j in live:
            after = buffers[j].after
            if buffers[j].device_id == device_id and not (after and first >= after[lane]):
                interference[i].append(j)
                interference[j].append(i)
        live.append(i)
    return interference


def max_live_bytes(buffers: Sequence[Buffer]) -> int:
    """A lower bound of every plan: the largest sum of buffers of a device that interfere with one another.

    It is computed at the moments with the most live bytes. On one lane all buffers live at a moment interfere; with
    several lanes they may not, so a greedy choice is made, at further moments as well, and may miss the largest sum.
    """
    most = 0
    sizes = _live_sizes(buffers)
    moments = heapq.nlargest(NUM_MOMENTS, sizes)
    if any(buffer.after for buffer in buffers):
        moments += sizes[:: len(sizes) // (4 * NUM_MOMENTS) + 1]
    for size, device_id, position in moments:
        if size > most:
            live = [b for b in buffers if b.device_id == device_id and b.first <= position <= b.last]
            most = max(most, _interfering_bytes(live))
    return most


def _live_sizes(buffers: Sequence[Buffer]) -> list[tuple[int, int, int]]:
    """(bytes, device, position) after each change of a device's live buffers: an upper bound of the memory in use."""
    changes = [(b.device_id, b.first, b.size) for b in buffers]
    changes += [(b.device_id, b.last + 1, -b.size) for b in buffers]
    live, device, sizes = 0, -1, []
    for device_id, position, change in sorted(changes):
        live = change if device_id != device else live + change
        device = device_id
        sizes.append((live, device_id, position))
    return sizes


def _interfering_bytes(buffers: list[Buffer]) -> int:
    """The bytes of a clique of interfering buffers, chosen greedily by size."""
    clique: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda one: -one.size):
        if all(buffer.interferes_with(other) for other in clique):
            clique.append(buffer)
    return sum(buffer.size for buffer in clique)


def _best_gap(size: int, taken: list[tuple[int, int]]) -> int:
    """The start of the smallest gap for `size` bytes between sorted (offset, size) pairs, or the end of the last.

    Best fit rather than first fit: it leaves the large gaps to large buffers.
    """
    best: int | None = None
    best_gap, end = 0, 0
    for offset, other_size in taken:
        gap = offset - end
        if gap >= size and (best is None or gap < best_gap):
            best, best_gap = end, gap
        end = max(end, offset + other_size)
    return end if best is None else best


def _by_size(buffers: Sequence[Buffer]) -> list[int]:
    return sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, buffers[i].first))


def _by_length(buffers: Sequence[Buffer]) -> list[int]:
    return sorted(range(len(buffers)), key=lambda i: (buffers[i].first - buffers[i].last, i))


def _improve(best: MemoryPlan, interference: list[list[int]], bound: int) -> MemoryPlan:
    """Random restarts: places a random half of the buffers that end above the bound first, at intervals all of them.

    Only buffers above the bound make a plan too large; placed earlier, they find gaps further down.
    """
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
        offsets = tuple(assign_offsets(buffers, interference, order))
        best = min(best, MemoryPlan(buffers, offsets), key=lambda plan: plan.peak_bytes)
        if best.peak_bytes <= bound:
            break
    return best
