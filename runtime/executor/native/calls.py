"""Native calls of a plan as flat arrays, filled again only when the sizes or addresses of a step change."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.core.ir.dims import Dim, evaluate
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.executor.native.locations import Location

Numbers = npt.NDArray[np.int64]


class Formulas:
    """Distinct formulas of the step's sizes: a small table of numbers that calls index."""

    def __init__(self) -> None:
        self._index: dict[Dim, int] = {}

    def index(self, dim: Dim) -> int:
        """The index of the formula in the table."""
        return self._index.setdefault(dim, len(self._index))

    def values(self, sizes: Mapping[str, int]) -> Numbers:
        """The table i64[number of formulas] for these sizes."""
        return np.array([number_of(dim, sizes) for dim in self._index], dtype=np.int64)


def number_of(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The formula's value; the tensors of a step determine every symbol of its graph."""
    number = evaluate(dim, sizes)
    assert isinstance(number, int), f"{number} is not determined by any tensor of the step"
    return number


class CallList:
    """The call table that `sage_run` reads: `add` while a plan is made, `finish` once, `fill` for each new step.

    A tensor is the address of a base plus an offset; an absent one has base -1 and the address 0. In memory a call is
    eight words: the addresses of the kernel, its tensors, its sizes and its attrs, the stream, the address and number
    of the calls to wait for, and whether calls of other streams wait for it (`Call` in runner.cpp).
    """

    def __init__(self) -> None:
        self.formulas = Formulas()
        self._base_index: dict[str, int] = {}
        self._bases: list[int] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._attrs: list[float] = []
        self._waits: list[int] = []
        self._calls: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(
        self,
        function: int,
        tensors: Sequence[Location | None],
        sizes: Sequence[Dim],
        attrs: Sequence[float],
        stream: int = 0,
        waits: Sequence[int] = (),
    ) -> None:
        """Appends a call of the function at the address `function`; `waits` are earlier calls of other streams."""
        firsts = len(self._bases), len(self._sizes), len(self._attrs)
        self._calls.append((function, *firsts, stream, len(self._waits), len(waits), 0))
        self._waits += waits
        for tensor in tensors:
            self._bases.append(-1 if tensor is None else self.base(tensor.base))
            self._offsets.append(self.formulas.index(0 if tensor is None else tensor.offset * DTYPES[tensor.dtype]))
        self._sizes += [self.formulas.index(size) for size in sizes]
        self._attrs += attrs

    def base(self, name: str) -> int:
        """The index of a base, added if it is new."""
        return self._base_index.setdefault(name, len(self._base_index))

    @property
    def base_names(self) -> tuple[str, ...]:
        return tuple(self._base_index)

    def finish(self) -> None:
        """Lays out the calls. Call it once: the table holds addresses of these arrays, so they must not move again."""
        self._size_index = np.array(self._sizes, dtype=np.intp)
        self._base_of = np.array(self._bases, dtype=np.intp)
        self._offset_of = np.array(self._offsets, dtype=np.intp)
        self._attr_array = np.array(self._attrs, dtype=np.float64)
        self._size_array = np.zeros(len(self._sizes), dtype=np.int64)
        self._tensor_array = np.zeros(len(self._bases), dtype=np.int64)
        self._wait_array = np.array(self._waits, dtype=np.int64)
        tensors, sizes, attrs, waits = (
            array.ctypes.data for array in (self._tensor_array, self._size_array, self._attr_array, self._wait_array)
        )
        firsts = np.array(self._calls, dtype=np.int64).reshape(-1, 8)
        # From indices to addresses: a column's index times its element size, plus the address of the column's array.
        self._table = firsts * np.array([1, 8, 8, 8, 1, 8, 1, 1]) + np.array([0, tensors, sizes, attrs, 0, waits, 0, 0])
        self._table[self._wait_array, 7] = 1

    def fill(self, values: Numbers, addresses: Sequence[int]) -> None:
        """Writes the sizes, from the table of formulas, and the tensors, from the address of each of `base_names`."""
        np.take(values, self._size_index, out=self._size_array)
        bases = np.array([*addresses, 0], dtype=np.int64)  # the last entry is base -1, of absent tensors
        np.add(bases[self._base_of], values[self._offset_of], out=self._tensor_array)

    @property
    def address(self) -> int:
        """The address of the first call; the others follow it in memory."""
        return int(self._table.ctypes.data)

    def num_streams(self, calls: range) -> int:
        """The number of streams that a run of these calls needs: the largest stream, plus one."""
        return int(self._table[calls.start : calls.stop, 4].max(initial=0)) + 1
