"""Operations of a device that steps are made of: memory, copies, streams, events and captured graphs.

The executor uses a GPU through `DeviceApi` only, so that tests can count and delay these operations without one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sageLLM.runtime.executor.device_streams import StreamApi

Ints = npt.NDArray[np.int32]


class DeviceEvent(Protocol):
    """A point of a stream."""

    def record(self) -> None:
        """Marks the end of the work of the current stream so far."""

    def query(self) -> bool:
        """Whether the work before the event is done; also true for an event that was never recorded."""

    def synchronize(self) -> None:
        """Waits for the work before the event, without Python's lock."""


class DeviceGraph(Protocol):
    """Work that was captured once; `replay` starts all of it with one call."""

    def replay(self) -> None: ...


class DeviceApi(StreamApi, Protocol):
    """One device, its memory and its graphs."""

    def new_event(self) -> Any: ...

    def host_ints(self, count: int) -> Tensor:
        """Memory i32[count] of the host that the device copies from and to without the processor (pinned)."""

    def device_ints(self, count: int) -> Tensor:
        """Memory i32[count] of the device."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Starts a copy between memory of the host and of the device on the current stream."""

    def synchronize(self) -> None:
        """Waits for all work of the device."""

    def capture(self, work: Callable[[], list[Tensor]]) -> tuple[DeviceGraph, list[Tensor]]:
        """Captures the work without running it; returns the graph and the memory of its results.

        All graphs share one memory pool, since only one of them runs at a time: the results of a replay are valid until
        the next replay of any graph, which may have other values in their memory.
        """


class CudaApi:
    """The current GPU."""

    def __init__(self) -> None:
        self._pool: Any = None

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream()

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def host_ints(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def device_ints(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device="cuda")

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, work: Callable[[], list[Tensor]]) -> tuple[DeviceGraph, list[Tensor]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # In the default mode "global" a call that another thread makes, such as a copy to a tier, ends the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = work()
        return graph, [unowned(x) for x in outputs]


def unowned(x: Tensor) -> Tensor:
    """A tensor over the memory of x that does not keep it in use: in the pool of graphs, later captures use it too.

    Without this, every captured graph would have logits of its own. The pool keeps the memory as long as its graphs.
    """
    memory = x.untyped_storage()
    same = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), x.device, memory.nbytes())
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(same, x.storage_offset(), x.size(), x.stride())
