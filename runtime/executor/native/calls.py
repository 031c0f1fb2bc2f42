"""The native calls of a plan as flat arrays: sizes and addresses are written anew only when the step's sizes change."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.core.ir.dims import Dim, evaluate
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.executor.native.locations import Place

Numbers = npt.NDArray[np.int64]


class Formulas:
    """Formulas of the step's sizes, each once: a small table of numbers that calls index."""

    def __init__(self) -> None:
        self._index: dict[Dim, int] = {}

    def index(self, dim: Dim) -> int:
        """The formula's place in the table."""
        return self._index.setdefault(dim, len(self._index))

    def values(self, sizes: Mapping[str, int]) -> Numbers:
        """The table for these sizes."""
        return np.array([number_of(dim, sizes) for dim in self._index], dtype=np.int64)


def number_of(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The formula's value; every symbol of a graph gets one from the tensors of the step."""
    number = evaluate(dim, sizes)
    assert isinstance(number, int), f"no tensor of the step tells {number}"
    return number


class CallList:
    """Calls are added while a plan is made; `finish` lays them out in memory, and `fill` writes a step's numbers.

    A tensor is the address of a base plus an offset; an absent one has no base and the address 0. In memory a call is
    four addresses: of the kernel, its tensors, its sizes and its attrs (`Call` in runner.cpp).
    """

    def __init__(self) -> None:
        self.formulas = Formulas()
        self._base_index: dict[str, int] = {}
        self._bases: list[int] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._attrs: list[float] = []
        self._calls: list[tuple[int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, function: int, tensors: Sequence[Place | None], sizes: Sequence[Dim], attrs: Sequence[float]) -> None:
        """Appends a call of the function at this address."""
        self._calls.append((function, len(self._bases), len(self._sizes), len(self._attrs)))
        for place in tensors:
            self._bases.append(-1 if place is None else self.base(place.base))
            self._offsets.append(self.formulas.index(0 if place is None else place.offset * DTYPES[place.dtype]))
        self._sizes += [self.formulas.index(size) for size in sizes]
        self._attrs += attrs

    def base(self, name: str) -> int:
        """The number of a base."""
        return self._base_index.setdefault(name, len(self._base_index))

    @property
    def base_names(self) -> tuple[str, ...]:
        return tuple(self._base_index)

    def finish(self) -> None:
        """Lays out what was added; nothing is added afterwards, as the calls hold addresses of these arrays."""
        self._size_index = np.array(self._sizes, dtype=np.intp)
        self._base_of = np.array(self._bases, dtype=np.intp)
        self._offset_of = np.array(self._offsets, dtype=np.intp)
        self._attr_array = np.array(self._attrs, dtype=np.float64)
        self._size_array = np.zeros(len(self._sizes), dtype=np.int64)
        self._tensor_array = np.zeros(len(self._bases), dtype=np.int64)
        firsts = np.array(self._calls, dtype=np.int64).reshape(-1, 4)
        starts = [0, *(array.ctypes.data for array in (self._tensor_array, self._size_array, self._attr_array))]
        self._table = firsts * np.array([1, 8, 8, 8]) + np.array(starts)

    def fill(self, values: Numbers, addresses: Sequence[int]) -> None:
        """Writes sizes, from the table of formulas, and tensors, given the address of every base in `base_names`."""
        np.take(values, self._size_index, out=self._size_array)
        bases = np.array([*addresses, 0], dtype=np.int64)
        np.add(bases[self._base_of], values[self._offset_of], out=self._tensor_array)

    def address(self, first: int) -> int:
        """Where call number `first` stands; the others follow it."""
        return int(self._table.ctypes.data + first * self._table.strides[0])
