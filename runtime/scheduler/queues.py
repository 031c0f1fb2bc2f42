"""Request queues: by rank (order of admission) and round robin (order of decoding).

Both find and remove a member by id in O(1).
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from sageLLM.runtime.scheduler.request import Rank, Request

Member = TypeVar("Member", bound=Request)


class RankedQueue(Generic[Member]):
    """Queue sorted by rank. A member keeps the rank with which it was pushed.

    A binary heap with lazy deletion: `remove` only deletes the member; its heap entry is dropped when it reaches the
    top, or together with all other dead entries once they outnumber the live ones. So every operation costs O(log n)
    amortised.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, str]] = []
        self._members: dict[str, tuple[Rank, Member]] = {}

    def push(self, member: Member) -> None:
        """Insert a member; ranks of live members are distinct."""
        assert member.request_id not in self._members, f"{member.request_id!r} is queued twice"
        self._members[member.request_id] = (member.rank, member)
        heapq.heappush(self._heap, (member.rank, member.request_id))

    def peek(self) -> Member | None:
        """The member with the lowest rank, which stays in the queue."""
        if not self._members:
            return None
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._members[self._heap[0][1]][1]

    def remove(self, member: Member) -> None:
        """Remove a member, wherever it is."""
        del self._members[member.request_id]
        if self._heap[0][1] == member.request_id:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def get(self, request_id: str) -> Member | None:
        """The member with this id."""
        entry = self._members.get(request_id)
        return entry[1] if entry else None

    def _is_live(self, entry: tuple[Rank, str]) -> bool:
        rank, request_id = entry
        return request_id in self._members and self._members[request_id][0] == rank

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        """The members in order. Sorts, so it is meant for reports and tests."""
        for _, member in sorted(self._members.values(), key=lambda entry: entry[0]):
            yield member

    def __contains__(self, member: object) -> bool:
        return (member if isinstance(member, str) else getattr(member, "request_id", None)) in self._members


class WaitingQueue(RankedQueue[Request]):
    """Requests without KV by rank, with a bound on how often a request is overtaken.

    After `max_overtakes` later arrivals were admitted before the longest-waiting request, that request moves to the
    head for good: it is not overtaken again, and not preempted for a later arrival. So a request with k older ones in
    the scheduler is admitted after at most `(k + 1) * max_overtakes` later arrivals, whatever its rank. These k include
    the older requests that run: when one is preempted it is again the longest-waiting request.
    """

    def __init__(self, max_overtakes: int) -> None:
        super().__init__()
        self._max_overtakes = max_overtakes
        self._by_age: list[tuple[int, str]] = []  # a heap of arrival numbers and ids, ended and repeated ones included
        self._num_overtakes = 0

    def push(self, member: Request) -> None:
        super().push(member)
        heapq.heappush(self._by_age, (member.sequence_number, member.request_id))
        if len(self._by_age) > 2 * len(self._members) + 16:
            self._by_age = sorted({entry for entry in self._by_age if self._waits(entry)})

    def _waits(self, entry: tuple[int, str]) -> bool:
        number, request_id = entry
        return request_id in self._members and self._members[request_id][1].sequence_number == number

    def _oldest(self) -> Request | None:
        """The longest-waiting request."""
        while self._by_age and not self._waits(self._by_age[0]):
            heapq.heappop(self._by_age)
        return self._members[self._by_age[0][1]][1] if self._by_age else None

    def admit(self, member: Request) -> None:
        """Remove the head, and count the overtaking of the longest-waiting request."""
        oldest = self._oldest()
        self.remove(member)
        if oldest is None or oldest is member:
            self._num_overtakes = 0
        elif member.rank[0] != -math.inf:
            # A promoted member does not count: it was itself the longest-waiting request.
            self._num_overtakes += 1
            if self._num_overtakes >= self._max_overtakes:
                self._promote(oldest)

    def move(self, member: Request, rank: Rank) -> None:
        """Change the rank of a member; a promoted one stays at the head."""
        if rank == member.rank or member.rank[0] == -math.inf:
            return
        self.remove(member)  # a member keeps the rank with which it was pushed, so it is pushed again
        member.rank = rank
        super().push(member)

    def _promote(self, member: Request) -> None:
        self.move(member, (-math.inf, member.sequence_number))
        self._num_overtakes = 0


class RoundRobinQueue(Generic[Member]):
    """Queue in which served members move to the back, so that all progress when a step cannot serve all."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}

    def append(self, member: Member) -> None:
        """Insert a member at the back."""
        assert member.request_id not in self._members, f"{member.request_id!r} is queued twice"
        self._members[member.request_id] = member

    def remove(self, member: Member) -> None:
        """Remove a member."""
        del self._members[member.request_id]

    def to_back(self, member: Member) -> None:
        """Move a member to the back."""
        self._members[member.request_id] = self._members.pop(member.request_id)

    def to_front(self, members: Iterable[Member]) -> None:
        """Move these members to the front, in their order. Costs O(length of the queue)."""
        first = {member.request_id: member for member in members if member.request_id in self._members}
        self._members = first | self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __contains__(self, member: object) -> bool:
        return (member if isinstance(member, str) else getattr(member, "request_id", None)) in self._members
