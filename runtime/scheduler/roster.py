"""Requests of a decode step with their offsets from the decode clock, changed by what joins and leaves."""

from bisect import bisect_left
from collections.abc import Collection, Iterable

from sageLLM.runtime.scheduler.request import DecodeSlot, Request


class Roster:
    """Decoding requests in the order in which they joined, and their offsets from the decode clock.

    Steps in flight refer to the two lists, so they are copied before the first change after `share`: a copy costs a
    hundredth of reading the offsets from the requests again. `DecodeSlot.number` increases from request to request.
    """

    __slots__ = ("_is_shared", "_numbers", "offsets", "requests")

    def __init__(self, slots: Iterable[DecodeSlot]) -> None:
        slots = list(slots)
        self.requests: list[Request] = [slot.request for slot in slots]
        self.offsets = [slot.planned_offset for slot in slots]
        self._numbers = [slot.number for slot in slots]
        self._is_shared = False

    def share(self, skipped: Collection[DecodeSlot] = ()) -> tuple[list[Request], list[int]]:
        """The requests but the skipped ones, and their offsets. The caller may keep the lists."""
        if not skipped:
            self._is_shared = True
            return self.requests, self.offsets
        requests, offsets = self.requests.copy(), self.offsets.copy()
        for index in sorted(map(self._index, skipped), reverse=True):
            del requests[index], offsets[index]
        return requests, offsets

    def append(self, slot: DecodeSlot) -> None:
        """Add a request at the end."""
        self._own()
        self.requests.append(slot.request)
        self.offsets.append(slot.planned_offset)
        self._numbers.append(slot.number)

    def remove(self, slot: DecodeSlot) -> None:
        """Remove a request."""
        self._own()
        index = self._index(slot)
        del self.requests[index], self.offsets[index], self._numbers[index]

    def move_back(self, slot: DecodeSlot) -> None:
        """Copy the offset of a slot that has changed."""
        self._own()
        self.offsets[self._index(slot)] = slot.planned_offset

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Check that these are the requests, in this order, with their offsets."""
        slots = [request.slot for request in requests if request.slot is not None]
        assert self.requests == [slot.request for slot in slots], "the roster is not the queue"
        assert self.offsets == [slot.planned_offset for slot in slots], "an offset in the roster is out of date"
        assert self._numbers == [slot.number for slot in slots], "the requests are out of order"

    def _own(self) -> None:
        if self._is_shared:
            self.requests, self.offsets, self._is_shared = self.requests.copy(), self.offsets.copy(), False

    def _index(self, slot: DecodeSlot) -> int:
        index = bisect_left(self._numbers, slot.number)
        assert self.requests[index] is slot.request, "the requests are out of order"
        return index
