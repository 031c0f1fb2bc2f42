"""Flattens a kernel graph: locates its values and turns its nodes into native calls or, rarely, Python calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from sageLLM.runtime.core.ir.dims import Dim, Expr, product
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.op_node import Inference, Memo, OpNode
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.core.model.kv_form import KvForm
from sageLLM.runtime.executor.native.calls import CallList
from sageLLM.runtime.executor.native.locations import Aliases, Location, contiguous, part_location, row_strides
from sageLLM.runtime.executor.native.streams import CallStreams, ensure_events
from sageLLM.runtime.kernels.cpu.callables import number

MAX_COPY_DIMS = 4
"""The number of dims of `sage_gather_rows` in runner.cpp."""


class Functions(Protocol):
    """Addresses of native functions."""

    @property
    def kernels(self) -> Mapping[str, NativeKernel]: ...

    def why_not(self, op: str, element: str | None, attrs: Mapping[str, Any]) -> str | None:
        """The reason if the op lacks a function for this element type and these attrs, else None."""

    def address(self, op: str, element: str | None, *, unpacks: bool = False, form: str | None = None) -> int: ...

    @property
    def copy_address(self) -> int:
        """The address of `sage_gather_rows` in runner.cpp."""

    @property
    def poison_address(self) -> int:
        """The address of `sage_poison` in runner.cpp."""


@dataclass(frozen=True, slots=True)
class PythonCall:
    """A node that runs in Python, between native calls, and the reason."""

    node: OpNode
    operands: tuple[Location | None, ...]
    outputs: tuple[Location, ...]
    attrs: Mapping[str, Any]
    reason: str

    @property
    def fresh(self) -> tuple[Location, ...]:
        """The outputs that are not computed in place."""
        return _fresh(self.node.outputs, self.outputs)


@dataclass(slots=True)
class Flattened:
    """The calls of a plan: `steps` are runs of native calls (as ranges of call numbers) and Python calls, in order.

    For each native call, `ops` has the name of its op, `nodes` the id of its node, and `stream_of` its stream. `extra`
    holds the values that the graph's memory plan does not cover.
    """

    calls: CallList = field(default_factory=CallList)
    steps: list[range | PythonCall] = field(default_factory=list)
    locations: dict[str, Location] = field(default_factory=dict)
    extra: dict[str, Location] = field(default_factory=dict)
    ops: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    stream_of: list[int] = field(default_factory=list)

    @property
    def python_calls(self) -> list[PythonCall]:
        return [step for step in self.steps if isinstance(step, PythonCall)]


class Weights(Protocol):
    """Locations of the graph's weights, in the forms that ops read."""

    def is_packed(self, name: str) -> bool:
        """Whether the model keeps the weight in packed form."""

    def form(self, name: str) -> str | None:
        """The form of a weight that the model keeps as packed codes."""

    def location(self, ref: TensorRef, gates: int | None) -> Location:
        """The location of a weight packed with `gates` gates, or (None) in its declared form."""

    def location_as_held(self, ref: TensorRef) -> Location: ...


def flatten(
    graph: ExecutionGraph,
    functions: Functions,
    inputs: Mapping[str, Location],
    weights: Weights,
    cache_forms: Mapping[str, KvForm] = MappingProxyType({}),
    *,
    poison: bool = False,
) -> Flattened:
    """Flattens a kernel-level graph; `inputs` are the locations of all its inputs, caches and tables included.

    `cache_forms` are the inputs that are caches of codes.

    Calls keep the streams of their nodes and the planned waits. With `poison`, a call before each native call fills the
    memory that it writes with NaN.
    """
    return _Flattener(graph, functions, inputs, weights, cache_forms, poison=poison).run()


class _Flattener:
    def __init__(
        self,
        graph: ExecutionGraph,
        functions: Functions,
        inputs: Mapping[str, Location],
        weights: Weights,
        cache_forms: Mapping[str, KvForm],
        *,
        poison: bool,
    ) -> None:
        ensure_events(graph)
        self._order = graph.topological_sort()
        self._aliases = Aliases(self._order, graph.outputs)
        self._streams = CallStreams(self._order)
        self._poison = poison
        self._external = {*inputs, *graph.weights}
        self._names = graph.weights
        self._functions, self._weights, self._cache_forms = functions, weights, cache_forms
        # The layers of a model have equal types, so they share their inference.
        self._memo: Memo = {}
        self._out = Flattened(locations=dict(inputs))

    def run(self) -> Flattened:
        for position, node in enumerate(self._order):
            assert isinstance(node, OpNode), f"{node.node_id} is a block: expand the graph first"
            self._streams.begin(node)
            self._add(position, node, node.inference(self._memo))
            self._streams.end(node)
        self._out.stream_of = self._streams.stream_of
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
        # Attributes are written into the call table once, by `finish`, so they cannot depend on the step's sizes.
        symbolic = [name for name, value in inference.attrs.items() if isinstance(value, Expr)]
        if symbolic:
            return f"{symbolic[0]} is only known at run time"
        return self._functions.why_not(kernel.op.op, _element(kernel, inference), inference.attrs)

    def _add_view(self, node: OpNode, inference: Inference, kernel: NativeKernel) -> None:
        """Locates outputs that are parts of an operand, or of a contiguous copy if strides cannot express them."""
        parts = kernel.parts or {}
        for (name, part), ref in zip(parts.items(), node.outputs, strict=True):
            source = node.input(part.base)
            base = self._locate(source)
            location = part_location(node, inference, part, ref, base)
            if location is None:
                location = part_location(node, inference, part, ref, self._copy(node, base, ref.name))
                assert location is not None, f"{node.node_id}: {name} cannot be a part of a contiguous operand"
            else:
                # A part of the copy is not an alias: the source can be overwritten while the part is still read.
                self._aliases.record(ref.name, source.name)
            self._out.locations[ref.name] = location

    def _add_native(self, position: int, node: OpNode, inference: Inference, kernel: NativeKernel) -> None:
        operands = [self._readable(node, name, kernel) for name in node.input_types]
        table = node.optional_input(kernel.unpacks) if kernel.unpacks else None
        unpacks = table is not None and self._is_held_packed(table)
        outputs = self._place_outputs(position, node, updates=kernel.updates)
        sizes = [inference.env[name] for name in kernel.sizes]
        patterns = (*node.input_types.values(), *node.output_types.values())
        for pattern, location in zip(patterns, (*operands, *outputs), strict=True):
            # An absent operand has strides too, since the kernel's signature has a fixed number of sizes.
            strides = row_strides(pattern, location) if location is not None else (0,) * max(len(pattern.dims) - 1, 0)
            assert strides is not None, f"{node.node_id}: {pattern} has a layout without row strides"
            sizes += strides
        attrs = [number(node.attr_types[name], inference.attrs[name]) for name in node.attr_types]
        form = self._form(node, kernel)
        function = self._functions.address(node.op, _element(kernel, inference), unpacks=unpacks, form=form)
        self._append(node, node.op, function, [*operands, *outputs], sizes, attrs, _fresh(node.outputs, outputs))

    def _add_python(
        self, position: int, node: OpNode, inference: Inference, reason: str, *, updates: bool | None
    ) -> None:
        refs = [node.optional_input(name) for name in node.input_types]
        operands = tuple(None if ref is None else self._locate(ref) for ref in refs)
        outputs = self._place_outputs(position, node, updates=updates)
        self._streams.add_python_call()
        self._out.steps.append(PythonCall(node, operands, tuple(outputs), inference.attrs, reason))

    def _locate(self, ref: TensorRef) -> Location:
        return self._weights.location(ref, None) if ref.name in self._names else self._out.locations[ref.name]

    def _form(self, node: OpNode, kernel: NativeKernel) -> str | None:
        """The form of the codes that the node reads: those of a weight, or of caches."""
        for name in (*kernel.packed, *([kernel.unpacks] if kernel.unpacks else [])):
            ref = node.optional_input(name)
            if ref is not None and ref.name in self._names and (form := self._weights.form(ref.name)) is not None:
                return form
        refs = [ref for name in kernel.caches if (ref := node.optional_input(name)) is not None]
        forms = {self._cache_forms.get(self._locate(ref).base) for ref in refs}
        assert len(forms) <= 1, f"{node.node_id}: the caches of {node.op} must have one form"
        cache_form = next(iter(forms), None)
        return None if cache_form is None else cache_form.native

    def _is_held_packed(self, ref: TensorRef) -> bool:
        return ref.name in self._names and self._weights.is_packed(ref.name)

    def _readable(self, node: OpNode, name: str, kernel: NativeKernel) -> Location | None:
        """The operand in the form that the kernel reads, or a copy of it if row strides cannot express its layout."""
        ref = node.optional_input(name)
        if ref is None:
            return None
        gates = kernel.packed.get(name)
        if gates is not None:
            assert ref.name in self._names, f"{node.node_id}: {name} of {node.op} is packed, so it must be a weight"
            return self._weights.location(ref, gates)
        if name == kernel.unpacks and self._is_held_packed(ref):
            return self._weights.location_as_held(ref)
        location = self._locate(ref)
        if row_strides(node.input_types[name], location) is not None:
            return location
        return self._copy(node, location, f"{node.node_id}.{name}")

    def _copy(self, node: OpNode, location: Location, name: str) -> Location:
        """Adds a call that copies a tensor to new contiguous memory."""
        assert len(location.shape) <= MAX_COPY_DIMS, (
            f"{name}: expected at most {MAX_COPY_DIMS} dims, got {len(location.shape)}"
        )
        target = contiguous(f"copy of {name}", location.dtype, location.shape)
        self._out.extra[target.base] = target
        missing = MAX_COPY_DIMS - len(location.shape)  # leading dims of size 1 and stride 0
        sizes = [DTYPES[location.dtype], *(1,) * missing, *location.shape, *(0,) * missing, *location.strides]
        self._append(node, "copy", self._functions.copy_address, [location, target], sizes, [], (target,))
        return target

    def _place_outputs(self, position: int, node: OpNode, *, updates: bool | None) -> list[Location]:
        """Locates a node's outputs: in place of an operand if the op `updates` it, or if no later node reads it.

        `updates` is None for an op that says neither; it is then taken to update the inputs of the graph, since a KV
        cache must not be copied.
        """
        locations = []
        for name, ref in zip(node.output_types, node.outputs, strict=True):
            source = node.optional_input(node.inplace[name]) if name in node.inplace else None
            if source is not None and self._goes_in_place(source, position, updates):
                self._aliases.record(ref.name, source.name)
                location = self._out.locations[source.name]
            else:
                location = contiguous(ref.name, ref.dtype, ref.shape)
                # The memory plan treats in-place results and views as aliases without memory. This one turned out to
                # need memory, which is appended after the planned values.
                if source is not None or node.is_view:
                    self._out.extra[ref.name] = location
            self._out.locations[ref.name] = location
            locations.append(location)
        return locations

    def _goes_in_place(self, source: TensorRef, position: int, updates: bool | None) -> bool:
        is_given = self._out.locations[source.name].base in self._external
        if updates or is_given:
            return updates is not False
        return not self._aliases.is_read_after(source.name, position)

    def _append(
        self,
        node: OpNode,
        op: str,
        function: int,
        tensors: Sequence[Location | None],
        sizes: Sequence[Dim],
        attrs: Sequence[float],
        made: tuple[Location, ...],
    ) -> None:
        """Adds a call that writes the values `made` to new memory."""
        for location in made if self._poison else ():
            num_bytes = product(location.shape) * DTYPES[location.dtype]
            self._append(node, "poison", self._functions.poison_address, [location], [num_bytes], [], ())
        self._out.calls.add(function, tensors, sizes, attrs, *self._streams.add_call(node))
        self._out.ops.append(op)
        self._out.nodes.append(node.node_id)
        # Consecutive native calls become one run, that is, one call from Python.
        steps, end = self._out.steps, len(self._out.calls)
        if steps and isinstance(steps[-1], range):
            steps[-1] = range(steps[-1].start, end)
        else:
            steps.append(range(end - 1, end))


def _element(kernel: NativeKernel, inference: Inference) -> str | None:
    return kernel.element_in(inference.env)


def _fresh(refs: Sequence[TensorRef], locations: Sequence[Location]) -> tuple[Location, ...]:
    """The outputs that are not computed in place."""
    return tuple(location for ref, location in zip(refs, locations, strict=True) if location.base == ref.name)
