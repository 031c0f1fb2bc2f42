"""Sizes of a step, solved from the shapes of its tensors."""

from collections.abc import Sequence

from sageLLM.runtime.core.ir.dims import evaluate, free_symbols
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.executor.native.calls import number_of


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
