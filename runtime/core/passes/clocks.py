"""Happens-before relation of nodes: each lane runs its nodes in order, and dependencies synchronize the lanes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.order import Lane, lane


class Clocks:
    """For each node of an order, and each lane, the first node of that lane that surely runs after it.

    These are vector clocks (Mattern, Virtual Time and Global States of Distributed Systems, 1989), computed from the
    end. `dependencies` replaces the nodes' own: an executor waits for events, of which there are fewer.
    """

    def __init__(self, order: list[ExecutionNode], dependencies: Sequence[Collection[str]] | None = None) -> None:
        self.order = order
        self.position = {node.node_id: i for i, node in enumerate(order)}
        self.never = len(order)
        self.lanes: dict[Lane, list[int]] = {}
        for i, node in enumerate(order):
            self.lanes.setdefault(lane(node), []).append(i)
        self.number = {one: k for k, one in enumerate(self.lanes)}
        self.lane_of = [self.number[lane(node)] for node in order]
        waits = dependencies if dependencies is not None else [node.dependencies for node in order]
        self.after = self._one_lane() if len(self.lanes) < 2 else self._many_lanes(waits)

    def runs_after(self, later: int, earlier: int) -> bool:
        """Whether the node at one position surely runs after that at another."""
        return later >= self.after[earlier][self.lane_of[later]]

    def after_all(self, positions: Iterable[int]) -> tuple[int, ...]:
        """By lane, the first position that surely runs after all of `positions`, or `never`."""
        clocks = [self.after[i] for i in positions]
        return tuple(clocks[0]) if len(clocks) == 1 else tuple(map(max, zip(*clocks, strict=True)))

    def last_concurrent(self, after: tuple[int, ...]) -> int:
        """The last position, over all lanes, before the lane's position in `after`."""
        found = 0
        for members, first in zip(self.lanes.values(), after, strict=True):
            count = bisect_left(members, first)
            if count:
                found = max(found, members[count - 1])
        return found

    def _one_lane(self) -> list[list[int]]:
        return [[i + 1] for i in range(self.never)]

    def _many_lanes(self, waits: Sequence[Collection[str]]) -> list[list[int]]:
        # From the end, so that the clocks of all later nodes are complete. A node precedes its successor in the lane
        # and the nodes that wait for it, and all that these precede.
        after = [[self.never] * len(self.lanes) for _ in self.order]
        next_in_lane = [self.never] * len(self.lanes)
        for i in range(self.never - 1, -1, -1):
            k = self.lane_of[i]
            if next_in_lane[k] < self.never:
                _join(after[i], after[next_in_lane[k]], next_in_lane[k], k)
            next_in_lane[k] = i
            for dependency in waits[i]:
                _join(after[self.position[dependency]], after[i], i, k)
        return after


def _join(clock: list[int], known: list[int], later: int, lane_number: int) -> None:
    """Merges into `clock` the clock of a later node and that node itself."""
    for k, first in enumerate(known):
        if first < clock[k]:
            clock[k] = first
    clock[lane_number] = min(clock[lane_number], later)
