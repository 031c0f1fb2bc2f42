"""Decode steps on a GPU that start before the tokens of the step before are read: the tokens stay on the device.

A step that only advances the decodes of the last one needs nothing of the host but positions, block tables, and numbers
to draw with, which follow from the seeds. It is launched while that step runs, so the device does not wait for the host
between the two. Tokens that are filtered, adjusted or scored are chosen on the host, and their steps wait.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from sageLLM.runtime.worker.order_thread import OrderThread, Pending
from sageLLM.runtime.worker.orders import GroupOrder, StepResult
from sageLLM.runtime.worker.worker import LaunchedStep, Worker

PAUSE = 20e-6
"""Seconds between looks for an order that follows the running step."""
Results = list[StepResult]


class _Running(NamedTuple):
    step: LaunchedStep
    pending: Pending[Results]


class Lookahead:
    """Runs orders in a thread. At most one step is launched and not read when the next one is."""

    def __init__(self, worker: Worker, execute: Callable[[GroupOrder], Results]) -> None:
        """`execute` runs an order as a whole, for those that cannot be launched."""
        self._worker, self.execute = worker, execute
        self._thread = OrderThread[tuple[GroupOrder | None, Pending[Results]], None]("sagellm-worker")
        self._running: _Running | None = None

    def submit(self, order: GroupOrder) -> Pending[Results]:
        pending: Pending[Results] = Pending()
        self._thread.submit(self._start, (order, pending))
        self._thread.submit(self._finish_unless_followed, (None, pending))
        return pending

    def close(self) -> None:
        self._thread.close()

    def _start(self, submitted: tuple[GroupOrder | None, Pending[Results]]) -> None:
        order, pending = submitted
        assert order is not None, "a submitted order is started first"
        launched = self._launched(order)
        self._finish()
        if launched is None:
            pending.run(self.execute, order)
        else:
            self._running = _Running(launched, pending)

    def _launched(self, order: GroupOrder) -> LaunchedStep | None:
        """The step of an order on the device, or None if it must be executed as a whole."""
        if order.decode is None or order.prefill is not None or order.migrations:
            return None
        return self._worker.launch(order.decode, follows=self._running is not None)

    def _finish_unless_followed(self, submitted: tuple[GroupOrder | None, Pending[Results]]) -> None:
        """Reads the tokens of the step, unless the next order is there, which is then launched first."""
        running = self._running
        if running is None or running.pending is not submitted[1]:
            return
        while self._thread.is_idle and not running.step.tokens.is_done():
            time.sleep(PAUSE)
        if self._thread.is_idle:
            self._finish()

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.pending.run(self._read, running.step)

    def _read(self, step: LaunchedStep) -> Results:
        return [self._worker.finish(step)]
