"""Runs a kernel graph as one native call list, without Python between the kernels.

Streams of the graph run in parallel: stream 0 on the thread of the caller, the others on native threads.
Intermediates are in an arena, laid out by the memory plan for the largest step so far; views are address arithmetic;
weights and caches are bound once. A step with the sizes and inputs of the previous step runs without any preparation.
An op without a native kernel is called in Python between two runs of native calls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from sageLLM.runtime.core.ir.dims import product
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.core.passes.lifetimes import Lifetimes
from sageLLM.runtime.core.passes.memory import MemoryPlan, plan_memory
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.native.call_times import CallStamps, CallTime
from sageLLM.runtime.executor.native.calls import number_of
from sageLLM.runtime.executor.native.flatten import Functions, PythonCall, flatten
from sageLLM.runtime.executor.native.io_meter import make_meter
from sageLLM.runtime.executor.native.layer_progress import LayerProgress
from sageLLM.runtime.executor.native.locations import Location, contiguous
from sageLLM.runtime.executor.native.recorder import RecordedStep, StepRecorder
from sageLLM.runtime.executor.native.sizes import fixed_sizes, solve_sizes
from sageLLM.runtime.executor.native.weights import Weight, WeightForms
from sageLLM.runtime.kernels.cpu.callables import TORCH_DTYPES
from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.kernels.kv_codes import cache_form, declared_shape

ALIGN = 256
"""Alignment of values in the arena in bytes: four cache lines, so that threads never share a line of two values."""
Inputs = Mapping[str, Tensor | None]
Sizes = Mapping[str, int]


class Runner(Functions, Protocol):
    """Native functions, the call loop `run`, and the library that packs weights for them."""

    @property
    def library(self) -> Library | None: ...

    def run(self, calls: int, first: int, end: int, num_streams: int, stamps: int = 0) -> None:
        """Makes calls `first` to `end` of the list at the address `calls`; `stamps`, if set, receives their times."""


class NativePlan:
    """A graph ready to run on the CPU: `run(inputs)` returns its outputs in order.

    The outputs are in the arena: read them before the next step of any plan that shares it. `kernels` are the torch
    callables for ops without a native kernel. With `poison`, the memory of a value is filled with NaN before the call
    that writes it, so that a read too early, or an overwrite too early, shows in the outputs.
    """

    def __init__(
        self,
        graph: ExecutionGraph,
        runner: Runner,
        kernels: Mapping[str, Kernel],
        bound: Mapping[str, Weight],
        arena: Arena | None = None,
        *,
        poison: bool = False,
        recorder: StepRecorder | None = None,
    ) -> None:
        """Raises KeyError if `bound` lacks a weight of the graph, or `kernels` an op without a native kernel."""
        self.graph = graph
        self._runner, self._kernels = runner, kernels
        self._weights = WeightForms({name: bound[name] for name in graph.weights}, runner.library)
        self._bound = {name: x for name in graph.inputs if isinstance(x := bound.get(name), Tensor)}
        self._arena = Arena() if arena is None else arena
        self._poison = poison
        # Sizes of bound tensors are known now; those of the other inputs come with each step.
        self._fixed = fixed_sizes(graph, bound)
        self._free = [ref for name, ref in graph.inputs.items() if name not in bound]
        refs = graph.inputs
        self._forms = {name: form for name, x in self._bound.items() if (form := cache_form(refs[name], x))}
        self._flat = flatten(graph, runner, dict(self._inputs()), self._weights, self._forms, poison=poison)
        # Looked up now, so that an op without any kernel fails when the plan is made and not in a step.
        self._python = {id(call): kernels[call.node.op] for call in self._flat.python_calls}
        self._lifetimes = Lifetimes(graph)
        self._capacity: dict[str, int] = {}
        self._memory = MemoryPlan()
        self._extra: dict[str, int] = {}
        self._num_bytes = -1  # no plan yet
        self._recorder = StepRecorder() if recorder is None else recorder
        self._sizes: Sizes = {}
        self._state: tuple[Any, ...] = ()
        self._last_inputs: Inputs | None = None
        self._outputs: list[Tensor] = []
        self._steps: list[Callable[[], None]] = []
        self.io = make_meter(graph, self._flat)
        self.progress: LayerProgress | None = None

    @property
    def num_native_calls(self) -> int:
        return len(self._flat.calls)

    @property
    def python_calls(self) -> Mapping[str, tuple[int, str]]:
        """The ops that run in Python, with the number of their nodes and the reason."""
        found: dict[str, tuple[int, str]] = {}
        for call in self._flat.python_calls:
            found[call.node.op] = found.get(call.node.op, (0, ""))[0] + 1, call.reason
        return found

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Runs the step; a missing input is None, which is valid for optional operands only.

        The mapping of the step before may be passed again, with the same tensors in it.
        """
        self._prepare(inputs)
        if self._recorder.sink is None:
            for step in self._steps:
                step()
            if self.io is not None:
                self.io.end_step()
        else:
            self._recorder.sink(RecordedStep(self.graph, self._sizes, inputs, self._run_timed()))
        return self._outputs

    def watch_layers(self) -> "NativePlan":
        """Records the progress of the next step by layer, and returns this plan when no layer counts as complete."""
        if self.progress is None and self.io is None:
            self.progress = LayerProgress(self.graph, self._flat)
            self._state, self._last_inputs = (), None  # so that the calls of the next step have its address
        if self.progress is not None:
            self.progress.begin_step()
        return self

    def _prepare(self, inputs: Inputs) -> None:
        """Fills the call table, unless the inputs are those of the previous step."""
        if inputs is not self._last_inputs or self._arena.address != self._state[0]:
            values = [inputs.get(ref.name) for ref in self._free]
            if self._state_of(values) != self._state:
                self._lay_out(values)
            self._last_inputs = inputs

    @property
    def last_step(self) -> tuple[Sizes, Inputs]:
        """The sizes and inputs of the last step."""
        return self._sizes, self._last_inputs or {}

    def _state_of(self, values: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Everything that the call table depends on. Another plan may have moved the shared arena in the meantime."""
        return (self._arena.address, *[None if x is None else (x.data_ptr(), x.shape) for x in values])

    def time_calls(self, inputs: Inputs) -> list[CallTime]:
        """Runs the step once as `run` does; returns the time of each call, in the order of the list."""
        self._prepare(inputs)
        return self._run_timed()

    def _run_timed(self) -> list[CallTime]:
        stamps = CallStamps(self._flat)
        for step, run in zip(self._flat.steps, self._steps, strict=True):
            if isinstance(step, PythonCall):
                stamps.time_python_call(step, run)
            else:
                self._native_step(step, stamps.address)()
                stamps.add(step)
        return stamps.times

    def time_ops(self, inputs: Inputs) -> dict[str, float]:
        """Runs the step; returns the total seconds of each op."""
        seconds: dict[str, float] = {}
        for time in self.time_calls(inputs):
            seconds[time.op] = seconds.get(time.op, 0.0) + time.seconds
        return seconds

    def _inputs(self) -> Iterator[tuple[str, Location]]:
        """The locations of all inputs: bound tensors with their actual strides, others contiguous.

        The strides of a cache of codes count bytes, as its tensor has them.
        """
        for name, ref in self.graph.inputs.items():
            bound = self._bound.get(name)
            if bound is None:
                yield name, contiguous(name, ref.dtype, ref.shape)
            else:
                shape = declared_shape(bound) if name in self._forms else bound.shape
                yield name, Location(name, ref.dtype, tuple(shape), tuple(bound.stride()))

    def _lay_out(self, values: Sequence[Tensor | None]) -> None:
        """Fills the call table with the sizes and addresses of a step that differs from the previous one."""
        self._sizes = sizes = self._step_sizes(values)
        self._reserve(sizes)  # before any address is written: growing moves the arena
        tensors = {ref.name: x for ref, x in zip(self._free, values, strict=True)}
        calls = self._flat.calls
        calls.fill(calls.formulas.values(sizes), [self._address(name, tensors) for name in calls.base_names])
        self._outputs = [self._tensor(self._flat.locations[ref.name], sizes, tensors) for ref in self.graph.outputs]
        self._steps = list(self._make_steps(sizes, tensors))
        self._state = self._state_of(values)

    def _step_sizes(self, values: Sequence[Tensor | None]) -> dict[str, int]:
        sizes = dict(self._fixed)
        for ref, tensor in zip(self._free, values, strict=True):
            if tensor is not None:
                _check_input(ref, tensor)
                solve_sizes(ref, tensor.shape, sizes)
        return sizes

    def _reserve(self, sizes: Sizes) -> None:
        """Plans the memory again, with room to grow, if the step is larger than all previous ones.

        A plan for larger sizes is valid for smaller ones, so memory is planned a logarithmic number of times.
        """
        step = {name: size for name, size in sizes.items() if name not in self._fixed}
        if self._num_bytes < 0 or any(size > self._capacity.get(name, -1) for name, size in step.items()):
            self._capacity = {name: _rounded(max(size, self._capacity.get(name, 0))) for name, size in step.items()}
            largest = {**self._fixed, **self._capacity}
            self._memory = plan_memory(self._lifetimes, largest, ALIGN)
            self._extra = {}
            end = self._memory.peak_bytes
            # Values outside the memory plan are few and small; they get separate memory for the whole step.
            for name, location in self._flat.extra.items():
                self._extra[name] = end
                end += -(-_num_bytes(location, largest) // ALIGN) * ALIGN
            self._num_bytes = end
        self._arena.reserve(self._num_bytes)

    def _offset(self, base: str) -> int | None:
        """The offset of a base in the arena, in bytes; None for a weight or an input."""
        return self._extra[base] if base in self._extra else self._memory.offset(base)

    def _address(self, base: str, tensors: Inputs) -> int:
        offset = self._offset(base)
        if offset is not None:
            return self._arena.address + offset
        if base in self._weights:
            return self._weights[base].data_ptr()
        tensor = self._bound[base] if base in self._bound else tensors[base]
        return 0 if tensor is None else tensor.data_ptr()

    def _tensor(self, location: Location, sizes: Sizes, tensors: Inputs) -> Tensor:
        """A torch view of a value."""
        offset = number_of(location.offset, sizes)
        shape = tuple(number_of(dim, sizes) for dim in location.shape)
        strides = tuple(number_of(dim, sizes) for dim in location.strides)
        start = self._offset(location.base)
        if start is not None:
            return self._arena.view(
                start + offset * DTYPES[location.dtype], TORCH_DTYPES[location.dtype], shape, strides
            )
        tensor = self._weights[location.base] if location.base in self._weights else self._bound.get(location.base)
        tensor = tensors[location.base] if tensor is None else tensor
        assert isinstance(tensor, Tensor), f"{location.base} must be a tensor"
        if location.base in self._forms:
            return tensor
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)

    def _make_steps(self, sizes: Sizes, tensors: Inputs) -> Iterator[Callable[[], None]]:
        for step in self._flat.steps:
            if isinstance(step, PythonCall):
                yield self._python_step(step, sizes, tensors)
            else:
                stamped = self.io or self.progress
                yield self._native_step(step, 0 if stamped is None else stamped.address)

    def _native_step(self, calls: range, stamps: int = 0) -> Callable[[], None]:
        num_streams = self._flat.calls.num_streams(calls)
        return partial(self._runner.run, self._flat.calls.address, calls.start, calls.stop, num_streams, stamps)

    def _python_step(self, call: PythonCall, sizes: Sizes, tensors: Inputs) -> Callable[[], None]:
        def is_absent(location: Location | None) -> bool:
            return location is None or (location.base in tensors and tensors[location.base] is None)

        operands = [
            None if location is None or is_absent(location) else self._tensor(location, sizes, tensors)
            for location in call.operands
        ]
        outputs = [self._tensor(location, sizes, tensors) for location in call.outputs]
        kernel, attrs = self._python[id(call)], call.attrs
        poisonings = list(self._poisonings(call.fresh, sizes)) if self._poison else ()

        def run() -> None:
            for poison in poisonings:
                poison()
            results = kernel(*operands, **attrs)
            # A torch kernel allocates its results; later native calls read them at their planned locations.
            for output, result in zip(outputs, (results,) if len(outputs) == 1 else results, strict=True):
                if output.data_ptr() != result.data_ptr():
                    output.copy_(result)

        return run

    def _poisonings(self, locations: Sequence[Location], sizes: Sizes) -> Iterator[Callable[[], None]]:
        for location in locations:
            start, num_bytes = self._offset(location.base), _num_bytes(location, sizes)
            if start is not None:
                yield partial(self._arena.poison, start, num_bytes)


def _check_input(ref: TensorRef, tensor: Tensor) -> None:
    if tensor.dtype != TORCH_DTYPES[ref.dtype] or not tensor.is_contiguous() or tensor.dim() != len(ref.shape):
        raise ValueError(
            f"expected a contiguous tensor {ref}, got {tensor.dtype} of {list(tensor.shape)}, strides {tensor.stride()}"
        )


def _num_bytes(location: Location, sizes: Sizes) -> int:
    return number_of(product(location.shape), sizes) * DTYPES[location.dtype]


def _rounded(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()
