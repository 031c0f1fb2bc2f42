"""Holds Ctrl-C back while a step runs."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class Interrupts:
    """Handler of SIGINT: while `is_held`, the first Ctrl-C waits for `release`; a second one takes effect at once.

    An exception in the middle of a step would leave scheduler, buffers and texts half updated.
    """

    def __init__(self, previous: Handler) -> None:
        self.is_held = True
        self._previous = previous
        self._received: tuple[int, FrameType | None] | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_held and self._received is None:
            self._received = (number, frame)
        else:
            self._previous(number, frame)

    def hold(self) -> None:
        self.is_held = True

    def release(self) -> None:
        """Lets a Ctrl-C that was held back take effect now; usually this raises KeyboardInterrupt."""
        self.is_held = False
        received, self._received = self._received, None
        if received is not None:
            self._previous(*received)


@contextmanager
def held_interrupts() -> Iterator[Interrupts]:
    """Holds Ctrl-C back in the block, except after `release`, until `hold`.

    Only the main thread receives signals; elsewhere, and with a handler that is not Python's, this does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield Interrupts(lambda number, frame: None)
        return
    interrupts = Interrupts(previous)
    signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)
    interrupts.release()
