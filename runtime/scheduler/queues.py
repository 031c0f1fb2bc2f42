"""The two orders in which requests stand in line: by rank (who is admitted next) and by turn (who decodes next).

Both find a member by id in O(1); nothing here walks a line to remove from its middle.
"""

import heapq
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Ranked(Protocol):
    """What a line needs to know of its members."""

    @property
    def request_id(self) -> str: ...

    @property
    def rank(self) -> tuple[int, int]: ...


Member = TypeVar("Member", bound=Ranked)


class RankedQueue(Generic[Member]):
    """A line sorted by rank. A member keeps the rank with which it was pushed.

    A binary heap with lazy deletion: `remove` only forgets the member; its entry goes when it reaches the top, or all
    dead entries go together once they are the greater part. So all operations cost O(log n) amortised.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], str]] = []
        self._members: dict[str, tuple[tuple[int, int], Member]] = {}

    def push(self, member: Member) -> None:
        """Put a member in line; ranks are distinct among live members."""
        assert member.request_id not in self._members, f"{member.request_id!r} is in line twice"
        self._members[member.request_id] = (member.rank, member)
        heapq.heappush(self._heap, (member.rank, member.request_id))

    def peek(self) -> Member | None:
        """The member of the lowest rank, which stays in line."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._members[self._heap[0][1]][1] if self._heap else None

    def remove(self, member: Member) -> None:
        """Take a member out of line, wherever it stands."""
        del self._members[member.request_id]
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def get(self, request_id: str) -> Member | None:
        """The member with this id."""
        entry = self._members.get(request_id)
        return entry[1] if entry else None

    def _is_live(self, entry: tuple[tuple[int, int], str]) -> bool:
        rank, request_id = entry
        return request_id in self._members and self._members[request_id][0] == rank

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        """The members by rank; sorts, so it is meant for reports and tests."""
        for _, member in sorted(self._members.values(), key=lambda entry: entry[0]):
            yield member

    def __contains__(self, member: object) -> bool:
        return (member if isinstance(member, str) else getattr(member, "request_id", None)) in self._members


class TurnQueue(Generic[Member]):
    """A line in which whoever was served goes to the back, so that all take turns when not all are served at once."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}

    def append(self, member: Member) -> None:
        """Join at the back."""
        assert member.request_id not in self._members, f"{member.request_id!r} is in line twice"
        self._members[member.request_id] = member

    def remove(self, member: Member) -> None:
        """Leave the line."""
        del self._members[member.request_id]

    def to_back(self, member: Member) -> None:
        """Let everybody else go first."""
        self._members[member.request_id] = self._members.pop(member.request_id)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __contains__(self, member: object) -> bool:
        return (member if isinstance(member, str) else getattr(member, "request_id", None)) in self._members
