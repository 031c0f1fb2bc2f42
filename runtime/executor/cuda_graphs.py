"""Plans for a GPU: one copy of the inputs to it, one of the tokens back, and decode steps as CUDA graphs.

A captured graph has fixed shapes and addresses. `StepInputs` therefore pads decode steps to one of a few `Buckets`,
each of which is captured before the first request and then replayed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.executor.device_api import DeviceApi, DeviceGraph
from sageLLM.runtime.executor.input_buffers import InputBuffers, Place
from sageLLM.runtime.executor.red_zones import require_unit_strides
from sageLLM.runtime.executor.token_reader import PendingTokens, TokenReader, marked_tokens
from sageLLM.runtime.executor.torch_plan import Plan

Inputs = Mapping[str, Tensor | None]


class DeviceBuffers:
    """The memory of inputs and tokens of all plans of a device: only one step at a time uses it."""

    def __init__(self, api: DeviceApi) -> None:
        self.api = api
        self.inputs, self.tokens = InputBuffers(api), TokenReader(api)


class DevicePlan(Plan):
    """A plan that copies its integer inputs, which are on the host, to the device; others are there already.

    `tokens` are those of the last run, if the graph samples. Nothing waits for the device but reading them. The inputs
    `draw_temperature` and `draw_uniform`, the bits of float32 and float64 numbers, are for the kernel of `draw`.
    """

    def __init__(
        self,
        graph: ExecutionGraph,
        kernels: Mapping[str, Kernel],
        bound: Mapping[str, Tensor],
        buffers: DeviceBuffers,
    ) -> None:
        super().__init__(graph, kernels, bound, buffers.api)
        self.tokens: PendingTokens | None = None
        self._buffers = buffers
        self._draw = kernels.get("draw")
        self._samples = any(ref.dtype == "i64" for ref in graph.outputs)
        self._has_run = False

    def run(self, inputs: Inputs) -> list[Tensor]:
        host, rest = divided(inputs)
        return self._started(self._compute({**rest, **self._buffers.inputs.upload(host)}))

    def _compute(self, inputs: Inputs) -> list[Tensor]:
        """The outputs of the graph, and marked tokens if it samples."""
        if self._has_run:
            outputs = super().run(inputs)
        else:  # strides do not depend on the step
            calls = self._calls
            self.wrap_kernels(require_unit_strides)
            outputs = super().run(inputs)
            self._calls, self._has_run = calls, True
        return [*outputs, self._tokens(inputs, *outputs)] if self._samples else outputs

    def _tokens(self, inputs: Inputs, values: Tensor, greedy_ids: Tensor, best: Tensor | None = None) -> Tensor:
        """The marked tokens, drawn in rows with a temperature; ranks that share the vocabulary draw together, later."""
        temperature, uniform = inputs.get("draw_temperature"), inputs.get("draw_uniform")
        drawn = None
        if self._draw is not None and best is None and temperature is not None and uniform is not None:
            drawn = self._draw(values, greedy_ids, temperature.view(torch.float32), uniform.view(torch.float64))
        return marked_tokens(values, greedy_ids, best, drawn)

    def _started(self, outputs: list[Tensor]) -> list[Tensor]:
        """Starts the copy of the tokens; returns the other outputs."""
        if not self._samples:
            return outputs
        self.tokens = self._buffers.tokens.start(outputs[-1])
        return outputs[:-1]


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """One bucket: the graph, the place of its inputs, other inputs that it has memory for, and its outputs.

    The outputs of all graphs may be in the same memory.
    """

    graph: DeviceGraph
    place: Place
    received: list[Tensor]
    outputs: list[Tensor]


class GraphedPlan(DevicePlan):
    """A plan of the decode stage that replays the graphs of `capture`; steps of other shapes run call by call.

    Streams and collectives are captured too: NCCL's calls become nodes of the graph. All ranks capture the same buckets
    in the same order.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._captured: dict[torch.Size, CapturedGraph] = {}
        self._last_memory: object = None

    def run(self, inputs: Inputs) -> list[Tensor]:
        """The outputs of the step; the next step overwrites them."""
        captured = self._captured.get(_table_shape(inputs))
        if captured is None:
            return super().run(inputs)
        return self._replayed(captured, inputs)

    def run_after_last(self, inputs: Inputs) -> list[Tensor]:
        """As `run`, with the tokens of the last run as ids: no other step may have run since, and its rows are these.

        The tokens are on the device; those of failed rows count as 0.
        """
        captured = self._captured[_table_shape(inputs)]
        assert captured.place.memory is self._last_memory, "the tokens of the last run must be in the same memory"
        return self._replayed(captured, inputs, keeps_ids=True)

    def _replayed(self, captured: CapturedGraph, inputs: Inputs, *, keeps_ids: bool = False) -> list[Tensor]:
        host, _ = divided(inputs)
        self._buffers.inputs.fill(captured.place, host, keeps_ids=keeps_ids)
        captured.graph.replay()
        self._last_memory = captured.place.memory
        return self._started(captured.outputs)

    def _compute(self, inputs: Inputs) -> list[Tensor]:
        """As a plan of the base class; then the token ids of the inputs are those of the next step."""
        outputs, ids = super()._compute(inputs), inputs.get("ids")
        if self._samples and ids is not None and len(ids) == len(outputs[-1]):
            ids.copy_(outputs[-1].clamp(min=0))
        return outputs

    def capture(self, inputs: Inputs) -> None:
        """Captures the graph of steps of these shapes, after one that compiles the kernels, which no capture can do.

        Memory that a pipeline stage receives values in is replaced by memory of the graph.
        """
        host, rest = divided(inputs)
        api, buffers = self._buffers.api, self._buffers.inputs
        place = buffers.place(host)
        received = {name: torch.empty_like(x) for name, x in rest.items()}
        fixed = {**place.device, **received}
        buffers.fill(place, host)
        self._compute(fixed)
        api.synchronize()
        graph, outputs = api.capture(lambda: self._compute(fixed))
        self._captured[_table_shape(inputs)] = CapturedGraph(graph, place, [*received.values()], outputs)

    @property
    def num_captured(self) -> int:
        return len(self._captured)


def divided(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs that are on the host, which are integers, and the others."""
    host: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, x in inputs.items():
        if x is not None:
            (host if x.dtype == torch.int32 else rest)[name] = x
    return host, rest


def _table_shape(inputs: Inputs) -> torch.Size:
    table = inputs["block_table"]
    assert table is not None, "every decode step has a block table"
    return table.shape
