"""A device that records what a GPU would be told. Its work waits until something waits for it.

So a buffer that is filled again before its copy was made, or read before, shows in the tokens. No GPU is required.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sageLLM import LLM
from sageLLM.runtime.executor.planner import TorchPlanner
from sageLLM.runtime.worker import build

MODEL = Path(__file__).parents[2] / "examples/tiny_python_model"
FREE = {"aten::slice.Tensor", "aten::view", "aten::select.int", "aten::alias", "aten::detach"}
FREE |= {"aten::resolve_conj", "aten::resolve_neg", "aten::to.dtype_layout"}
"""Calls that only make views, also those of NumPy."""


class Event:
    def __init__(self, device: RecordedDevice) -> None:
        self._device = device
        self._position, self._start = 0, 0.0

    def record(self) -> None:
        self._position, self._start = self._device.num_queued, time.monotonic()

    def query(self) -> bool:
        if time.monotonic() - self._start > self._device.step_seconds:
            self._device.run_until(self._position)
        return self._device.num_done >= self._position

    def synchronize(self) -> None:
        self._device.counts["waits"] += 1
        self._device.before_wait()
        self._device.run_until(self._position)


class Graph:
    def __init__(self, device: RecordedDevice, work: Callable[[], list[Tensor]], outputs: list[Tensor]) -> None:
        self._device, self._work, self._outputs = device, work, outputs

    def replay(self) -> None:
        self._device.counts["replays"] += 1
        self._device.queue(self._run)

    def _run(self) -> None:
        for output, result in zip(self._outputs, self._work(), strict=True):
            output.copy_(result)


class RecordedDevice:
    """A `DeviceApi` with one stream, which is a queue of calls."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.num_queued = self.num_done = 0
        self.is_running = False
        self.step_seconds = 0.01  # the time after which work is done although nothing waits for it
        self.before_wait: Callable[[], Any] = bool
        self._queue: deque[Callable[[], Any]] = deque()
        self._hosts: set[int] = set()

    def queue(self, call: Callable[[], Any]) -> None:
        self._queue.append(call)
        self.num_queued += 1

    def run_until(self, position: int) -> None:
        before, self.is_running = self.is_running, True
        with torch.inference_mode():
            while self.num_done < position:
                self._queue.popleft()()
                self.num_done += 1
        self.is_running = before

    def kernel(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel that runs after the work in the queue."""

        def launch(*operands: Any, **attrs: Any) -> Any:
            if not self.is_running:
                self.counts["launches"] += 1
                self.run_until(self.num_queued)
            return call(*operands, **attrs)

        return launch

    def new_stream(self) -> Any:
        raise AssertionError("the graphs of these tests have one stream")

    current_stream = new_stream

    def use(self, stream: Any) -> Any:
        raise AssertionError("the graphs of these tests have one stream")

    def new_event(self) -> Event:
        return Event(self)

    def host_ints(self, count: int) -> Tensor:
        self.counts["allocations"] += 1
        memory = torch.zeros(count, dtype=torch.int32)
        self._hosts.add(memory.untyped_storage().data_ptr())
        return memory

    def device_ints(self, count: int) -> Tensor:
        self.counts["allocations"] += 1
        return torch.full((count,), -7, dtype=torch.int32)

    def copy(self, target: Tensor, source: Tensor) -> None:
        to_host = target.untyped_storage().data_ptr() in self._hosts
        assert to_host != (source.untyped_storage().data_ptr() in self._hosts), "one side must be pinned"
        self.counts["copies out" if to_host else "copies in"] += 1
        self.queue(lambda: target.copy_(source))

    def synchronize(self) -> None:
        self.counts["synchronizations"] += 1
        self.run_until(self.num_queued)

    def capture(self, work: Callable[[], list[Tensor]]) -> tuple[Graph, list[Tensor]]:
        self.counts["captures"] += 1
        assert self.num_done == self.num_queued, "a capture begins when the device is idle"
        self.is_running = True
        outputs = work()
        self.is_running = False
        return Graph(self, work, outputs), outputs


class InOrder(TorchDispatchMode):
    """Runs calls of torch after the work in the queue, and counts them: on a GPU each allocates, copies or waits."""

    def __init__(self, device: RecordedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._device.is_running and func.name() not in FREE:
            self._device.counts[func.name()] += 1
            self._device.run_until(self._device.num_queued)
        return func(*args, **(kwargs or {}))


def llm_on(device: RecordedDevice, wrap: Mapping[str, Any] | None = None, model: Path = MODEL, **options: Any) -> LLM:
    """An engine on the device, with the reference kernels, or those of `wrap`."""
    with pytest.MonkeyPatch.context() as patch:

        def choose_planner(choice: str, registry: Any, *_: Any, captures: bool = True, **__: Any) -> TorchPlanner:
            kernels = {op: device.kernel(kernel) for op, kernel in {**registry.kernels, **(wrap or {})}.items()}
            return TorchPlanner(kernels, "triton", device, captures=captures)

        patch.setattr(build, "choose_planner", choose_planner)
        llm = LLM(model, dtype="float32", skip_tokenizer=True, **options)
    executor = llm.engine.executor
    execute = executor.execute

    def execute_in_order(order: Any) -> Any:
        with InOrder(device):
            return execute(order)

    executor.execute = execute_in_order
    if executor.lookahead is not None:
        executor.lookahead.execute = execute_in_order
    return llm


@contextmanager
def counted(device: RecordedDevice) -> Iterator[Counter[str]]:
    """The operations of the device and the other calls of torch in a block."""
    before, found = device.counts.copy(), Counter[str]()
    yield found
    found.update(device.counts - before)
