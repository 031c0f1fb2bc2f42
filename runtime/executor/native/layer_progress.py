"""Progress of a running step by layer: whether the KV of a layer has been written, read by other threads."""

from __future__ import annotations

import re

import numpy as np

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.executor.native.flatten import Flattened

END_ORDER = 3
_CACHE = re.compile(r"layers\.(\d+)\.[kv]_cache")


class LayerProgress:
    """The times that the native runner writes when calls end, and the last call of each layer that uses its caches."""

    def __init__(self, graph: ExecutionGraph, flat: Flattened) -> None:
        self._stamps = np.zeros((len(flat.calls), 4), dtype=np.int64)  # `Stamp` in runner.cpp
        self._last_call: dict[int, int] = {}
        for number, node_id in enumerate(flat.nodes):
            for ref in graph.nodes[node_id].inputs:
                if (found := _CACHE.fullmatch(ref.name)) is not None:
                    self._last_call[int(found[1])] = number
        for call in flat.python_calls:  # they have no times: their layers are complete at the end of the step
            for ref in call.node.inputs:
                if (found := _CACHE.fullmatch(ref.name)) is not None:
                    self._last_call.pop(int(found[1]), None)

    @property
    def address(self) -> int:
        return int(self._stamps.ctypes.data)

    def begin_step(self) -> None:
        self._stamps[:, END_ORDER] = 0

    def is_complete(self, layer: int) -> bool:
        """Whether the calls that write and read the KV of a layer of the model have ended in this step."""
        number = self._last_call.get(layer)
        return number is not None and self._stamps[number, END_ORDER] != 0
