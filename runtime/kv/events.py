"""Log of the blocks that the prefix cache can find, for routers that send requests to the KV that they need."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """A block can be found by its name from now on; `parent` is the block before it, None for the first."""

    name: bytes
    parent: bytes | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """A block was evicted."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Cleared:
    """No block can be found any more."""


KVEvent = Stored | Removed | Cleared


class KVEventLog:
    """Events in order, until they are taken."""

    def __init__(self) -> None:
        self._events: list[KVEvent] = []

    def store(self, name: bytes, parent: bytes | None, token_ids: Sequence[int]) -> None:
        self._events.append(Stored(name, parent, tuple(token_ids)))

    def remove(self, name: bytes) -> None:
        self._events.append(Removed(name))

    def clear(self) -> None:
        self._events.append(Cleared())

    def take(self) -> list[KVEvent]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events
