"""Sizes of a step, solved from the shapes of its tensors."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from sageLLM.runtime.core.ir.dims import evaluate, free_symbols
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.executor.native.calls import number_of
from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.kernels.kv_codes import cache_form, declared_shape


def solve_sizes(ref: TensorRef, shape: Sequence[int], sizes: dict[str, int]) -> None:
    """Solves the symbols of a declared shape from a tensor's shape and adds them to `sizes`.

    A dim can be a sum of two unknown symbols, such as the decode and prefill tokens of a step. Kernels only use the
    sum, so the first symbol takes the whole size and the other is 0. Raises ValueError if the shapes do not agree.
    """
    for dim, size in zip(ref.shape, shape, strict=True):
        unknown = sorted(free_symbols(dim) - sizes.keys())
        sizes.update(dict.fromkeys(unknown, 0))
        if unknown:
            sizes[unknown[0]] = size - number_of(dim, sizes)
        if evaluate(dim, sizes) != size:
            raise ValueError(f"expected {dim} == {evaluate(dim, sizes)} in this step for {ref}, got {list(shape)}")


def fixed_sizes(graph: ExecutionGraph, bound: Mapping[str, Weight]) -> dict[str, int]:
    """The sizes of bound tensors (weights, caches, tables), which do not change during the life of a plan."""
    sizes: dict[str, int] = {}
    for ref, shape in _shapes(graph, bound):
        solve_sizes(ref, shape, sizes)
    return sizes


def _shapes(graph: ExecutionGraph, bound: Mapping[str, Weight]) -> Iterator[tuple[TensorRef, Sequence[int]]]:
    for name, ref in graph.weights.items():
        if name in bound:
            yield ref, bound[name].shape
    for name, ref in graph.inputs.items():
        held = bound.get(name)
        if held is not None:
            yield ref, declared_shape(held) if isinstance(held, Tensor) and cache_form(ref, held) else held.shape
