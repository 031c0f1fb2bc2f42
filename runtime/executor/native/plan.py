"""A graph as one native call list: `NativePlan` runs a step without Python between its kernels.

Intermediates lie in an arena by the memory plan for the largest step so far, views are arithmetic on addresses, weights
and caches are bound once, and a step whose sizes and inputs are those of the step before writes nothing before it runs.
An op that has no native kernel is called in Python between two runs of native calls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from sageLLM.runtime.core.ir.dims import evaluate, free_symbols, product
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.passes.lifetimes import Lifetimes
from sageLLM.runtime.core.passes.memory import MemoryPlan, plan_memory
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.native.calls import number_of
from sageLLM.runtime.executor.native.flatten import Functions, PythonCall, flatten
from sageLLM.runtime.executor.native.locations import Place, contiguous
from sageLLM.runtime.executor.native.weights import Weight, WeightForms
from sageLLM.runtime.kernels.cpu.callables import TORCH_DTYPES
from sageLLM.runtime.kernels.cpu.library import Library

ALIGN = 256
Kernel = Callable[..., Any]
Inputs = Mapping[str, Tensor | None]
Sizes = Mapping[str, int]


class Runner(Functions, Protocol):
    """Native functions, the one that calls them in turn, and what packs weights for them."""

    @property
    def library(self) -> Library | None: ...

    def run(self, calls: int, num_calls: int) -> None: ...


class NativePlan:
    """A graph ready to run on the CPU: `run(inputs)` returns its outputs in order.

    The outputs lie in the arena: they are to be read before the next step of any plan that shares it. `kernels` are the
    torch callables for ops without a native kernel. With `poison`, memory is filled with NaN before a call makes a
    value in it, so that what is read too early, or overwritten too early, shows.
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
    ) -> None:
        """Raises KeyError where `bound` lacks a weight of the graph, or `kernels` an op without a native kernel."""
        self.graph = graph
        self._runner, self._kernels = runner, kernels
        self._weights = WeightForms({name: bound[name] for name in graph.weights}, runner.library)
        self._bound = {name: x for name in graph.inputs if isinstance(x := bound.get(name), Tensor)}
        self._arena = Arena() if arena is None else arena
        self._poison = poison
        self._fixed = _fixed_sizes(graph, bound)
        self._free = [ref for name, ref in graph.inputs.items() if name not in bound]
        self._flat = flatten(graph, runner, dict(self._inputs()), self._weights)
        self._python = {id(call): kernels[call.node.op] for call in self._flat.python_calls}
        self._lifetimes = Lifetimes(graph)
        self._capacity: dict[str, int] = {}
        self._memory = MemoryPlan()
        self._state: tuple[Any, ...] = ()
        self._outputs: list[Tensor] = []
        self._steps: list[Callable[[], None]] = []

    @property
    def num_native_calls(self) -> int:
        return len(self._flat.calls)

    @property
    def python_calls(self) -> Mapping[str, tuple[int, str]]:
        """The ops that run in Python: how many nodes, and why."""
        found: dict[str, tuple[int, str]] = {}
        for call in self._flat.python_calls:
            found[call.node.op] = found.get(call.node.op, (0, ""))[0] + 1, call.reason
        return found

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Runs the step; an input that is not given is None, which only an optional operand may be."""
        given = [inputs.get(ref.name) for ref in self._free]
        state = (self._arena.address, *[None if x is None else (x.data_ptr(), x.shape) for x in given])
        if state != self._state:
            self._lay_out(given)
        for step in self._steps:
            step()
        return self._outputs

    def time_ops(self, inputs: Inputs) -> dict[str, float]:
        """Runs the step call by call; the seconds that each op took, all its calls together."""
        self.run(inputs)
        seconds: dict[str, float] = {}
        for step, calls in zip(self._flat.steps, self._steps, strict=True):
            timed = [(step.node.op, calls)] if isinstance(step, PythonCall) else self._single_calls(step)
            for op, call in timed:
                start = perf_counter()
                call()
                seconds[op] = seconds.get(op, 0.0) + perf_counter() - start
        return seconds

    def _single_calls(self, calls: range) -> list[tuple[str, Callable[[], None]]]:
        return [(self._flat.ops[i], self._native_step(i, 1)) for i in calls]

    def _inputs(self) -> Iterator[tuple[str, Place]]:
        """The places of inputs; a bound tensor's are its own strides."""
        for name, ref in self.graph.inputs.items():
            bound = self._bound.get(name)
            if bound is None:
                yield name, contiguous(name, ref.dtype, ref.shape)
            else:
                yield name, Place(name, ref.dtype, tuple(bound.shape), tuple(bound.stride()))

    def _lay_out(self, given: Sequence[Tensor | None]) -> None:
        """Writes the sizes and addresses of a step that differs from the one before."""
        sizes = self._step_sizes(given)
        self._reserve(sizes)
        tensors = {ref.name: x for ref, x in zip(self._free, given, strict=True)}
        calls = self._flat.calls
        calls.fill(calls.formulas.values(sizes), [self._address(name, tensors) for name in calls.base_names])
        self._outputs = [self._tensor(self._flat.places[ref.name], sizes, tensors) for ref in self.graph.outputs]
        self._steps = list(self._make_steps(sizes, tensors))
        self._state = (self._arena.address, *[None if x is None else (x.data_ptr(), x.shape) for x in given])

    def _step_sizes(self, given: Sequence[Tensor | None]) -> dict[str, int]:
        sizes = dict(self._fixed)
        for ref, tensor in zip(self._free, given, strict=True):
            if tensor is not None:
                _check_input(ref, tensor)
                _solve(ref, tensor.shape, sizes)
        return sizes

    def _reserve(self, sizes: Sizes) -> None:
        """Plans the memory anew, with room to grow, if the step is larger than any before."""
        step = {name: size for name, size in sizes.items() if name not in self._fixed}
        if any(size > self._capacity.get(name, -1) for name, size in step.items()):
            self._capacity = {name: _rounded(max(size, self._capacity.get(name, 0))) for name, size in step.items()}
            largest = {**self._fixed, **self._capacity}
            self._memory = plan_memory(self._lifetimes, largest, ALIGN)
            self._extra: dict[str, int] = {}
            end = self._memory.peak_bytes
            for name, place in self._flat.extra.items():
                self._extra[name] = end
                end += -(-_num_bytes(place, largest) // ALIGN) * ALIGN
            self._num_bytes = end
        self._arena.reserve(self._num_bytes)

    def _offset(self, base: str) -> int | None:
        """Where memory begins in the arena; None for a weight or an input."""
        return self._extra[base] if base in self._extra else self._memory.offset(base)

    def _address(self, base: str, tensors: Inputs) -> int:
        offset = self._offset(base)
        if offset is not None:
            return self._arena.address + offset
        if base in self._weights:
            return self._weights[base].data_ptr()
        tensor = self._bound[base] if base in self._bound else tensors[base]
        return 0 if tensor is None else tensor.data_ptr()

    def _tensor(self, place: Place, sizes: Sizes, tensors: Inputs) -> Tensor:
        """A torch view of a value."""
        offset = number_of(place.offset, sizes)
        shape = tuple(number_of(dim, sizes) for dim in place.shape)
        strides = tuple(number_of(dim, sizes) for dim in place.strides)
        start = self._offset(place.base)
        if start is not None:
            return self._arena.view(start + offset * DTYPES[place.dtype], TORCH_DTYPES[place.dtype], shape, strides)
        tensor = self._weights[place.base] if place.base in self._weights else self._bound.get(place.base)
        tensor = tensors[place.base] if tensor is None else tensor
        assert isinstance(tensor, Tensor), f"{place.base} is not given as a tensor"
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)

    def _make_steps(self, sizes: Sizes, tensors: Inputs) -> Iterator[Callable[[], None]]:
        for step in self._flat.steps:
            if isinstance(step, PythonCall):
                if self._poison:
                    yield from self._poisonings(step.fresh, sizes)
                yield self._python_step(step, sizes, tensors)
            elif self._poison:
                for i in step:
                    yield from self._poisonings(self._flat.made[i], sizes)
                    yield self._native_step(i, 1)
            else:
                yield self._native_step(step.start, len(step))

    def _native_step(self, first: int, num_calls: int) -> Callable[[], None]:
        return partial(self._runner.run, self._flat.calls.address(first), num_calls)

    def _python_step(self, call: PythonCall, sizes: Sizes, tensors: Inputs) -> Callable[[], None]:
        def is_absent(place: Place | None) -> bool:
            return place is None or (place.base in tensors and tensors[place.base] is None)

        operands = [
            None if place is None or is_absent(place) else self._tensor(place, sizes, tensors)
            for place in call.operands
        ]
        outputs = [self._tensor(place, sizes, tensors) for place in call.outputs]
        kernel, attrs = self._python[id(call)], call.attrs

        def run() -> None:
            results = kernel(*operands, **attrs)
            for output, result in zip(outputs, (results,) if len(outputs) == 1 else results, strict=True):
                if output.data_ptr() != result.data_ptr():
                    output.copy_(result)

        return run

    def _poisonings(self, places: Sequence[Place], sizes: Sizes) -> Iterator[Callable[[], None]]:
        for place in places:
            start, num_bytes = self._offset(place.base), _num_bytes(place, sizes)
            if start is not None:
                yield partial(self._arena.poison, start, num_bytes)


def _fixed_sizes(graph: ExecutionGraph, bound: Mapping[str, Weight]) -> dict[str, int]:
    """The sizes that bound tensors have: of caches and tables, which stay while the plan lives."""
    sizes: dict[str, int] = {}
    for name, ref in (*graph.weights.items(), *graph.inputs.items()):
        if name in bound:
            _solve(ref, bound[name].shape, sizes)
    return sizes


def _solve(ref: TensorRef, shape: Sequence[int], sizes: dict[str, int]) -> None:
    """Adds the symbols of a declared shape, as the tensor's shape has them. Of a sum of two unknown symbols, as the
    decode and prefill tokens of a step are, the first takes all. ValueError if the shapes do not agree.
    """
    for dim, size in zip(ref.shape, shape, strict=True):
        unknown = sorted(free_symbols(dim) - sizes.keys())
        sizes.update(dict.fromkeys(unknown, 0))
        if unknown:
            sizes[unknown[0]] = size - number_of(dim, sizes)
        if evaluate(dim, sizes) != size:
            raise ValueError(f"{ref} is given a tensor of {list(shape)}; {dim} is {evaluate(dim, sizes)} in this step")


def _check_input(ref: TensorRef, tensor: Tensor) -> None:
    if tensor.dtype != TORCH_DTYPES[ref.dtype] or not tensor.is_contiguous() or tensor.dim() != len(ref.shape):
        raise ValueError(f"{ref} is given a {tensor.dtype} of {list(tensor.shape)}, strides {tensor.stride()}")


def _num_bytes(place: Place, sizes: Sizes) -> int:
    return number_of(product(place.shape), sizes) * DTYPES[place.dtype]


def _rounded(size: int) -> int:
    """The next power of two, so that the memory is planned anew a few times only."""
    return 1 << max(size - 1, 0).bit_length()
