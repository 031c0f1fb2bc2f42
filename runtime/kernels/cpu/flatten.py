"""Flattens a kernel graph: places its values, and turns its nodes into native calls or, rarely, calls in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sageLLM.runtime.core.dims import Dim, Expr
from sageLLM.runtime.core.graph import ExecutionGraph
from sageLLM.runtime.core.ir import Inference, InferKey, OpNode, TensorRef
from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.core.types import DTYPES
from sageLLM.runtime.kernels.cpu.callables import number
from sageLLM.runtime.kernels.cpu.calls import CallList
from sageLLM.runtime.kernels.cpu.places import Aliases, Place, contiguous, part_place, row_strides

MAX_COPY_DIMS = 4


class Functions(Protocol):
    """Where native functions lie in memory."""

    @property
    def kernels(self) -> Mapping[str, NativeKernel]: ...

    def why_not(self, op: str, element: str | None) -> str | None:
        """Why there is no function for this element type, or None."""

    def address(self, op: str, element: str | None) -> int: ...

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

    `made` names the values that each native call, and each Python call's step, makes in memory of their own; `extra`
    holds those that the graph's memory plan does not place.
    """

    calls: CallList = field(default_factory=CallList)
    steps: list[range | PythonCall] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    extra: dict[str, Place] = field(default_factory=dict)
    made: list[tuple[Place, ...]] = field(default_factory=list)

    @property
    def python_calls(self) -> list[PythonCall]:
        return [step for step in self.steps if isinstance(step, PythonCall)]


def flatten(graph: ExecutionGraph, functions: Functions, given: Mapping[str, Place]) -> Flattened:
    """`given` are the places of weights and inputs."""
    return _Flattener(graph, functions, given).run()


class _Flattener:
    def __init__(self, graph: ExecutionGraph, functions: Functions, given: Mapping[str, Place]) -> None:
        self._order = graph.topological_sort()
        self._aliases = Aliases(self._order, graph.outputs)
        self._given = set(given)
        self._functions = functions
        self._memo: dict[InferKey, Inference] = {}
        self._out = Flattened(places=dict(given))

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
            place = part_place(node, inference, part, ref, self._out.places[source.name])
            if place is None:
                place = part_place(node, inference, part, ref, self._copy(self._out.places[source.name], ref.name))
                assert place is not None, f"{node.node_id}: {name} cannot be a part of a contiguous operand"
            else:
                self._aliases.note(ref.name, source.name)
            self._out.places[ref.name] = place

    def _add_native(self, position: int, node: OpNode, inference: Inference, kernel: NativeKernel) -> None:
        operands = [self._readable(node, name) for name in node.input_types]
        outputs = self._place_outputs(position, node, updates=kernel.updates)
        sizes = [inference.env[name] for name in kernel.sizes]
        patterns = (*node.input_types.values(), *node.output_types.values())
        for pattern, place in zip(patterns, (*operands, *outputs), strict=True):
            strides = row_strides(pattern, place) if place is not None else (0,) * max(len(pattern.dims) - 1, 0)
            assert strides is not None, f"{node.node_id}: {pattern} is given a layout without row strides"
            sizes += strides
        attrs = [number(node.attr_types[name], inference.attrs[name]) for name in node.attr_types]
        function = self._functions.address(node.op, _element(kernel, inference))
        self._append(function, [*operands, *outputs], sizes, attrs, _fresh(node.outputs, outputs))

    def _add_python(
        self, position: int, node: OpNode, inference: Inference, reason: str, *, updates: bool | None
    ) -> None:
        refs = [node.optional_input(name) for name in node.input_types]
        operands = tuple(None if ref is None else self._out.places[ref.name] for ref in refs)
        outputs = self._place_outputs(position, node, updates=updates)
        self._out.steps.append(PythonCall(node, operands, tuple(outputs), inference.attrs, reason))

    def _readable(self, node: OpNode, name: str) -> Place | None:
        """The operand, or a copy of it if a kernel cannot be told its layout."""
        ref = node.optional_input(name)
        if ref is None:
            return None
        place = self._out.places[ref.name]
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
        self._append(self._functions.copy_address, [place, target], sizes, [], (target,))
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
        function: int,
        tensors: Sequence[Place | None],
        sizes: Sequence[Dim],
        attrs: Sequence[float],
        made: tuple[Place, ...],
    ) -> None:
        self._out.calls.add(function, tensors, sizes, attrs)
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
