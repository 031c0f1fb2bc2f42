"""Signs of progress of the pieces that a rank sends or checks, which renew their leases."""

from __future__ import annotations

import time
from collections.abc import Callable

from sageLLM.runtime.transport.handle import PieceKey

ALIVE_SECONDS = 0.5
"""The interval between two looks at the progress of the pieces."""

Progress = Callable[[], object]
"""Returns another value when a piece, or one that it waits for, has gone on since the last call."""


class Pulse:
    """The pieces at a rank, each with its progress. Used by several threads; every change is one assignment."""

    def __init__(self) -> None:
        self._progress: dict[PieceKey, Progress] = {}
        self._last: dict[PieceKey, object] = {}
        self._next_look = 0.0

    def limit(self, seconds: float | None) -> float | None:
        """Limits a wait of so many seconds (None: without limit), so that a look at the pieces is not late."""
        if not self._progress:
            return seconds
        return ALIVE_SECONDS if seconds is None else min(seconds, ALIVE_SECONDS)

    def hold(self, key: PieceKey, progress: Progress) -> None:
        """A piece is here, and waits for its turn or is being worked on."""
        self._progress[key] = progress

    def release(self, key: PieceKey) -> None:
        """The work on a piece has ended."""
        self._progress.pop(key, None)
        self._last.pop(key, None)

    def take_moved(self) -> list[PieceKey]:
        """The pieces with progress, and new ones; empty until some time after the last call."""
        now = time.monotonic()
        if now < self._next_look:
            return []
        self._next_look, moved = now + ALIVE_SECONDS, list[PieceKey]()
        for key, progress in list(self._progress.items()):
            found = progress()
            if key not in self._last or found != self._last[key]:
                moved.append(key)
            if key in self._progress:
                self._last[key] = found
        return moved
