"""Runs a kernel-level graph in Python, as a flat list of kernel calls over numbered slots.

On a GPU the calls run on the streams of their nodes; elsewhere one after another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sageLLM.runtime.core.ir.dims import Expr
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.core.passes.part_sizes import attrs_with_sizes
from sageLLM.runtime.executor.device_streams import StreamApi, make_streams
from sageLLM.runtime.executor.native.sizes import fixed_sizes, solve_sizes

_ABSENT = 0
"""The slot of an absent optional operand; it always holds None."""


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call: operands and results by slot, and the slots that are `dead` after it and can be freed."""

    node_id: str
    kernel: Kernel
    operands: tuple[int, ...]
    results: tuple[int, ...]
    attrs: Mapping[str, Any]
    dead: tuple[int, ...]


class Plan:
    """A graph ready to run: `run(inputs)` returns its outputs in order.

    Weights, tables and caches are bound once; the other inputs come with every run. Kernels take operands by position
    (None for an absent optional one) and attributes by keyword, and return outputs in spec order. `api` makes
    the streams of a GPU.
    """

    def __init__(
        self,
        graph: ExecutionGraph,
        kernels: Mapping[str, Kernel],
        bound: Mapping[str, torch.Tensor],
        api: StreamApi | None = None,
    ) -> None:
        """Raises KeyError if `bound` lacks a weight of the graph or `kernels` lacks an op."""
        self.graph = graph
        self._slots: dict[str, int] = {}
        self._values: list[torch.Tensor | None] = [None]
        for name in graph.weights:
            self._bind(name, bound[name])
        for name in graph.inputs:
            self._bind(name, bound.get(name))
        self._free_inputs = [(name, self._slots[name]) for name in graph.inputs if name not in bound]
        order = graph.topological_sort()
        self._streams = make_streams(graph, order, api)
        self._calls = self._flatten(order, kernels)
        self._fixed = fixed_sizes(graph, bound)
        self._has_symbols = any(isinstance(x, Expr) for call in self._calls for x in call.attrs.values())
        self._outputs = [self._slots[ref.name] for ref in graph.outputs]

    def run(self, inputs: Mapping[str, torch.Tensor | None]) -> list[torch.Tensor]:
        """Runs every call; a missing input is None, which is valid for optional operands only."""
        values = self._values.copy()  # bound tensors stay in the plan; intermediates die with this list
        for name, slot in self._free_inputs:
            values[slot] = inputs.get(name)
        sizes = self._sizes(inputs) if self._has_symbols else None
        if self._streams is None:
            for call in self._calls:
                _make(call, values, sizes)
        else:
            self._streams.fork()
            for call in self._calls:
                with self._streams.begin(call.node_id):
                    _make(call, values, sizes)
                self._streams.end(call.node_id)
            self._streams.join()
        return [_present(values[slot]) for slot in self._outputs]

    def _sizes(self, inputs: Mapping[str, torch.Tensor | None]) -> dict[str, int]:
        """The sizes of a step, for attributes that depend on them."""
        sizes = dict(self._fixed)
        for name, _ in self._free_inputs:
            if (x := inputs.get(name)) is not None:
                solve_sizes(self.graph.inputs[name], x.shape, sizes)
        return sizes

    def wrap_kernels(self, wrap: Callable[[Kernel], Kernel]) -> None:
        """Replaces every kernel by wrap(kernel), for example to time or check calls."""
        self._calls = [replace(call, kernel=wrap(call.kernel)) for call in self._calls]

    def _bind(self, name: str, value: torch.Tensor | None) -> None:
        self._slots[name] = len(self._values)
        self._values.append(value)

    def _flatten(self, nodes: list[ExecutionNode], kernels: Mapping[str, Kernel]) -> list[Call]:
        for node in nodes:
            for ref in node.outputs:
                self._bind(ref.name, None)
        last_use = self._last_uses(nodes)
        return [self._call(node, kernels, last_use.get(node.node_id, ())) for node in nodes]

    def _last_uses(self, nodes: list[ExecutionNode]) -> dict[str, tuple[int, ...]]:
        """The slots that are dead after each node. Outputs, weights and inputs of the graph are never dead.

        Values that two streams use live to the end of the step: torch takes memory to be free in the order of the
        stream that allocated it, and knows nothing of reads by others.
        """
        kept = {ref.name for ref in self.graph.outputs} | set(self.graph.weights) | set(self.graph.inputs)
        reader: dict[str, str] = {}
        stream_of = {} if self._streams is None else self._streams.stream_of
        first_stream: dict[str, int] = {}
        for node in nodes:
            stream = stream_of.get(node.node_id, 0)
            for ref in (*node.inputs, *node.outputs):
                reader[ref.name] = node.node_id
                if first_stream.setdefault(ref.name, stream) != stream:
                    kept.add(ref.name)
        dead: dict[str, list[int]] = {}
        for name, node_id in reader.items():
            if name not in kept:
                dead.setdefault(node_id, []).append(self._slots[name])
        return {node_id: tuple(slots) for node_id, slots in dead.items()}

    def _call(self, node: ExecutionNode, kernels: Mapping[str, Kernel], dead: tuple[int, ...]) -> Call:
        assert isinstance(node, OpNode), f"only op nodes can run; {node.node_id} is a block: expand the graph first"
        operands = tuple(self._operand_slot(node, name) for name in node.input_types)
        results = tuple(self._slots[ref.name] for ref in node.outputs)
        return Call(node.node_id, kernels[node.op], operands, results, node.attrs, dead)

    def _operand_slot(self, node: OpNode, name: str) -> int:
        ref = node.optional_input(name)
        return _ABSENT if ref is None else self._slots[ref.name]


def _make(call: Call, values: list[torch.Tensor | None], sizes: Mapping[str, int] | None) -> None:
    """Makes a call on the current stream."""
    attrs = call.attrs if sizes is None else attrs_with_sizes(call.attrs, sizes)
    result = call.kernel(*[values[slot] for slot in call.operands], **attrs)
    if len(call.results) == 1:
        values[call.results[0]] = result
    else:
        for slot, value in zip(call.results, result, strict=True):
            values[slot] = value
    # Dropping the last reference lets torch reuse the memory for the next results.
    for slot in call.dead:
        values[slot] = None


def _present(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None, "a graph output must be produced by a node"
    return value
