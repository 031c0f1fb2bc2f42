"""Gates of KV copies by layer, in a worker that computes a step meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

POLL_SECONDS = 5e-4


class Layers(Protocol):
    """Progress of the running step (`ModelRunner`)."""

    def watch_layers(self) -> None: ...
    def begin_step(self) -> None: ...
    def is_complete(self, layer: int) -> bool: ...


class StepCounter:
    """Counts the orders of a worker, and knows which layers of the running one are complete.

    The thread that executes orders writes, and the thread that copies KV reads; each field changes in one assignment.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.num_begun = self.num_ended = 0
        self.has_failed = False

    def gate(self, number: int) -> StepGate:
        """The gate of an order that has not begun."""
        self.layers.watch_layers()
        return StepGate(self, number)

    def begin(self) -> None:
        self.layers.begin_step()
        self.num_begun += 1

    def end(self) -> None:
        self.num_ended += 1


@dataclass(frozen=True, slots=True)
class StepGate:
    """Opens for each layer when the order of this number, from 1, has computed it."""

    counter: StepCounter
    number: int

    def wait(self, layer: int, seconds: float) -> bool | None:
        """True when the layer is complete, None if it is not within so many seconds, and false after a failure."""
        deadline = time.monotonic() + seconds
        while not self._is_open(layer):
            if self.counter.has_failed:
                return False
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)
        return True

    def _is_open(self, layer: int) -> bool:
        counter = self.counter
        if counter.num_ended >= self.number:
            return True
        return counter.num_begun == self.number and counter.layers.is_complete(layer)
