"""Gives values whose lifetimes do not meet the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from sageLLM.runtime.core.graph import ExecutionGraph
from sageLLM.runtime.core.ir import TensorRef
from sageLLM.runtime.core.passes.lifetimes import Buffer, Lifetimes, Sizes
from sageLLM.runtime.core.rewrite import DeclaredPass

MAX_ATTEMPTS = 100
MAX_PLACED = 6000
"""Plans that are tried, and buffers that are placed in them, while the best plan is above the lower bound."""


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
                node.metadata["offsets"] = [self.plan.offset(ref.name) for ref in node.outputs]
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
        buffer = buffers[i]
        live = [j for j in live if buffers[j].last >= buffer.first]
        for j in live:
            if buffer.meets(buffers[j]):
                beside[i].append(j)
                beside[j].append(i)
        live.append(i)
    return beside


def max_live_bytes(buffers: Sequence[Buffer]) -> int:
    """A lower bound of every plan: the largest sum of buffers that meet each other, at the start of one of them.

    On one lane these are all that are live there. On several the greedy choice may miss the largest sum.
    """
    has_lanes = any(buffer.after for buffer in buffers)
    most = 0
    live: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda one: one.first):
        live = [one for one in live if one.last >= buffer.first]
        meeting = [buffer]
        for one in live:
            if one.device_id == buffer.device_id and (not has_lanes or all(one.meets(other) for other in meeting)):
                meeting.append(one)
        most = max(most, sum(one.size for one in meeting))
        live.append(buffer)
    return most


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
    """Again and again places some of what stands above the bound first, in random order."""
    random, buffers, offsets = Random(0), best.buffers, best.offsets
    order = sorted(range(len(buffers)), key=lambda i: (offsets[i], -buffers[i].size))
    for _ in range(min(MAX_ATTEMPTS, MAX_PLACED // len(buffers) + 1)):
        above = [i for i in order if offsets[i] + buffers[i].size > bound]
        first = [i for i in above if random.random() < 0.5] or above
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
