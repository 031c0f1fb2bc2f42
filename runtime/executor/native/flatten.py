"""Flattens a kernel graph: places its values, and turns its nodes into native calls or, rarely, calls in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sageLLM.runtime.core.ir.dims import Dim, Expr
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.op_node import Inference, InferKey, OpNode
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.executor.native.calls import CallList
from sageLLM.runtime.executor.native.locations import Aliases, Place, contiguous, part_place, row_strides
from sageLLM.runtime.kernels.cpu.callables import number

MAX_COPY_DIMS = 4


class Functions(Protocol):
    """Where native functions lie in memory."""

    @property
    def kernels(self) -> Mapping[str, NativeKernel]: ...

    def why_not(self, op: str, element: str | None) -> str | None:
        """Why there is no function for this element type, or None."""

    def address(self, op: str, element: str | None, *, unpacks: bool = False) -> int: ...

    @property
    def copy_address(self) -> int:
        """Of `sage_gather_rows` in runner.cpp."""


@dataclass(frozen=True, slots=True)
class PythonCall:
    """A node that runs in Python, between native calls, and why."""

    node: OpNode
    operands: tuple[Place | None, ...]
    outputs: tuple[Place, ...]
    attrs: Mapping[str, Any]
    reason: str

    @property
    def fresh(self) -> tuple[Place, ...]:
        """The outputs that are not made in place."""
        return _fresh(self.node.outputs, self.outputs)


@dataclass(slots=True)
class Flattened:
    """What a plan runs: `steps` are runs of native calls (first, end) and Python calls, in order.

    For each native call, `ops` has its name, and `made` the values that it makes in memory of their own. `extra` holds
    the values that the graph's memory plan does not place.
    """

    calls: CallList = field(default_factory=CallList)
    steps: list[range | PythonCall] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    extra: dict[str, Place] = field(default_factory=dict)
    made: list[tuple[Place, ...]] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)

    @property
    def python_calls(self) -> list[PythonCall]:
        return [step for step in self.steps if isinstance(step, PythonCall)]


class Weights(Protocol):
    """The weights of the graph, in the forms that ops read."""

    def is_packed(self, name: str) -> bool:
        """Whether the weight is held in packed form."""

    def place(self, ref: TensorRef, gates: int | None) -> Place:
        """Where a weight lies that is packed with so many gates, or (None) as it was declared."""

    def place_as_held(self, ref: TensorRef) -> Place: ...


def flatten(graph: ExecutionGraph, functions: Functions, inputs: Mapping[str, Place], weights: Weights) -> Flattened:
    """`inputs` are the places of all inputs of the graph, caches and tables among them."""
    return _Flattener(graph, functions, inputs, weights).run()


class _Flattener:
    def __init__(
        self, graph: ExecutionGraph, functions: Functions, inputs: Mapping[str, Place], weights: Weights
    ) -> None:
        self._order = graph.topological_sort()
        self._aliases = Aliases(self._order, graph.outputs)
        self._given = {*inputs, *graph.weights}
        self._names = graph.weights
        self._functions, self._weights = functions, weights
        self._memo: dict[InferKey, Inference] = {}
        self._out = Flattened(places=dict(inputs))

    def run(self) -> Flattened:
        for position, node in enumerate(self._order):
            assert isinstance(node, OpNode), f"{node.node_id} is a block: expand the graph first"
            self._add(position, node, node.inference(self._memo))
        self._out.calls.finish()
        return self._out

    def _add(self, position: int, node: OpNode, inference: Inference) -> None:
        kernel = self._functions.kernels.get(node.op)
        if kernel is not None and kernel.parts is not None:
            self._add_view(node, inference, kernel)
            return
        reason = self._why_not_native(kernel, inference)
        if kernel is not None and reason is None:
            self._add_native(position, node, inference, kernel)
        else:
            self._add_python(position, node, inference, reason or "", updates=kernel.updates if kernel else None)

    def _why_not_native(self, kernel: NativeKernel | None, inference: Inference) -> str | None:
        if kernel is None:
            return "no kernel"
        symbolic = [name for name, value in inference.attrs.items() if isinstance(value, Expr)]
        if symbolic:
            return f"{symbolic[0]} is known in the step only"
        return self._functions.why_not(kernel.op.op, _element(kernel, inference))

    def _add_view(self, node: OpNode, inference: Inference, kernel: NativeKernel) -> None:
        """Places parts of an operand, or of a copy of it if they cannot be told by offsets and strides."""
        parts = kernel.parts or {}
        for (name, part), ref in zip(parts.items(), node.outputs, strict=True):
            source = node.input(part.base)
            base = self._place(source)
            place = part_place(node, inference, part, ref, base)
            if place is None:
                place = part_place(node, inference, part, ref, self._copy(base, ref.name))
                assert place is not None, f"{node.node_id}: {name} cannot be a part of a contiguous operand"
            else:
                self._aliases.note(ref.name, source.name)
            self._out.places[ref.name] = place

    def _add_native(self, position: int, node: OpNode, inference: Inference, kernel: NativeKernel) -> None:
        operands = [self._readable(node, name, kernel) for name in node.input_types]
        table = node.optional_input(kernel.unpacks) if kernel.unpacks else None
        unpacks = table is not None and self._is_held_packed(table)
        outputs = self._place_outputs(position, node, updates=kernel.updates)
        sizes = [inference.env[name] for name in kernel.sizes]
        patterns = (*node.input_types.values(), *node.output_types.values())
        for pattern, place in zip(patterns, (*operands, *outputs), strict=True):
            strides = row_strides(pattern, place) if place is not None else (0,) * max(len(pattern.dims) - 1, 0)
            assert strides is not None, f"{node.node_id}: {pattern} is given a layout without row strides"
            sizes += strides
        attrs = [number(node.attr_types[name], inference.attrs[name]) for name in node.attr_types]
        function = self._functions.address(node.op, _element(kernel, inference), unpacks=unpacks)
        self._append(node.op, function, [*operands, *outputs], sizes, attrs, _fresh(node.outputs, outputs))

    def _add_python(
        self, position: int, node: OpNode, inference: Inference, reason: str, *, updates: bool | None
    ) -> None:
        refs = [node.optional_input(name) for name in node.input_types]
        operands = tuple(None if ref is None else self._place(ref) for ref in refs)
        outputs = self._place_outputs(position, node, updates=updates)
        self._out.steps.append(PythonCall(node, operands, tuple(outputs), inference.attrs, reason))

    def _place(self, ref: TensorRef) -> Place:
        return self._weights.place(ref, None) if ref.name in self._names else self._out.places[ref.name]

    def _is_held_packed(self, ref: TensorRef) -> bool:
        return ref.name in self._names and self._weights.is_packed(ref.name)

    def _readable(self, node: OpNode, name: str, kernel: NativeKernel) -> Place | None:
        """The operand in the form that the kernel reads, or a copy of it if it cannot be told the layout."""
        ref = node.optional_input(name)
        if ref is None:
            return None
        gates = kernel.packed.get(name)
        if gates is not None:
            assert ref.name in self._names, f"{node.node_id}: {name} of {node.op} is packed, so it has to be a weight"
            return self._weights.place(ref, gates)
        if name == kernel.unpacks and self._is_held_packed(ref):
            return self._weights.place_as_held(ref)
        place = self._place(ref)
        if row_strides(node.input_types[name], place) is not None:
            return place
        return self._copy(place, f"{node.node_id}.{name}")

    def _copy(self, place: Place, name: str) -> Place:
        """Adds a call that copies a tensor to contiguous memory of its own."""
        assert len(place.shape) <= MAX_COPY_DIMS, f"{name}: a tensor of {len(place.shape)} dims is not copied"
        target = contiguous(f"copy of {name}", place.dtype, place.shape)
        self._out.extra[target.base] = target
        missing = MAX_COPY_DIMS - len(place.shape)
        sizes = [DTYPES[place.dtype], *(1,) * missing, *place.shape, *(0,) * missing, *place.strides]
        self._append("copy", self._functions.copy_address, [place, target], sizes, [], (target,))
        return target

    def _place_outputs(self, position: int, node: OpNode, *, updates: bool | None) -> list[Place]:
        """What is made in place goes there if it must (the op `updates`; None: unknown, so caches are taken to be
        updated) or if nobody reads afterwards what was there.
        """
        places = []
        for name, ref in zip(node.output_types, node.outputs, strict=True):
            source = node.optional_input(node.inplace[name]) if name in node.inplace else None
            if source is not None and self._goes_in_place(source, position, updates):
                self._aliases.note(ref.name, source.name)
                place = self._out.places[source.name]
            else:
                place = contiguous(ref.name, ref.dtype, ref.shape)
                if source is not None or node.is_view:
                    self._out.extra[ref.name] = place
            self._out.places[ref.name] = place
            places.append(place)
        return places

    def _goes_in_place(self, source: TensorRef, position: int, updates: bool | None) -> bool:
        is_given = self._out.places[source.name].base in self._given
        if updates or is_given:
            return updates is not False
        return not self._aliases.is_read_after(source.name, position)

    def _append(
        self,
        op: str,
        function: int,
        tensors: Sequence[Place | None],
        sizes: Sequence[Dim],
        attrs: Sequence[float],
        made: tuple[Place, ...],
    ) -> None:
        self._out.calls.add(function, tensors, sizes, attrs)
        self._out.ops.append(op)
        self._out.made.append(made)
        steps, end = self._out.steps, len(self._out.calls)
        if steps and isinstance(steps[-1], range):
            steps[-1] = range(steps[-1].start, end)
        else:
            steps.append(range(end - 1, end))


def _element(kernel: NativeKernel, inference: Inference) -> str | None:
    return kernel.element_in(inference.env)


def _fresh(refs: Sequence[TensorRef], places: Sequence[Place]) -> tuple[Place, ...]:
    """The outputs that are not made in place."""
    return tuple(place for ref, place in zip(refs, places, strict=True) if place.base == ref.name)
