"""Thread that runs jobs one after another, on Linux with a priority of its choice."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

import torch

BACKGROUND = 10
"""The nice value of threads that must not delay the computation on their core."""


class JobThread:
    """Runs jobs in the order of `submit`, in inference mode."""

    def __init__(self, name: str, nice: int = 0) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._nice = nice
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the thread after the jobs submitted before."""
        self._jobs.put(None)
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        yield_to_others(self._nice)
        while (job := self._jobs.get()) is not None:
            job()


def yield_to_others(nice: int) -> None:
    """Lowers the priority of the calling thread; on other systems than Linux it would be that of the process."""
    if nice and sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
