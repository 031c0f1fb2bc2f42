"""Times of the calls of a step, taken in the native runner."""

from collections.abc import Callable
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np

from sageLLM.runtime.executor.native.flatten import Flattened, PythonCall


class CallTime(NamedTuple):
    """One call of a step. `begin_ns` and `end_ns` are on the clock of `time.perf_counter_ns`.

    `begin_order` and `end_order` number the beginnings and ends of all calls of the step: a call that waits for another
    begins with a larger number than that of the other's end. `stream` is numbered as in `number_streams`.
    """

    node_id: str
    op: str
    stream: int
    begin_ns: int
    end_ns: int
    begin_order: int
    end_order: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e9


class CallStamps:
    """The memory to which the runner writes times, and the times of the step so far."""

    def __init__(self, flat: Flattened) -> None:
        self._flat = flat
        self._stamps = np.zeros((len(flat.calls), 4), dtype=np.int64)  # `Stamp` in runner.cpp
        self._num_python_calls = 0
        self.times: list[CallTime] = []

    @property
    def address(self) -> int:
        return int(self._stamps.ctypes.data)

    def add(self, calls: range) -> None:
        """Takes the times of native calls that have run."""
        moved = 2 * self._num_python_calls  # the runner counts native calls only
        for i in calls:
            begin_ns, end_ns, begin_order, end_order = (int(number) for number in self._stamps[i])
            flat, orders = self._flat, (begin_order + moved, end_order + moved)
            self.times.append(CallTime(flat.nodes[i], flat.ops[i], flat.stream_of[i], begin_ns, end_ns, *orders))

    def time_python_call(self, call: PythonCall, run: Callable[[], None]) -> None:
        """Makes a call in Python."""
        begin = perf_counter_ns()
        run()
        end = perf_counter_ns()
        order = 2 * len(self.times)
        self._num_python_calls += 1
        self.times.append(CallTime(call.node.node_id, call.node.op, 0, begin, end, order, order + 1))
