"""Locations of a graph's values: base memory, offset and strides, as formulas of the step's sizes.

Views and values computed in place share another value's memory, so they need no call: only their offsets and strides
differ.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from sageLLM.runtime.core.ir.dims import Dim, evaluate
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Inference, OpNode
from sageLLM.runtime.core.ir.types import TypePattern
from sageLLM.runtime.core.kernels import Part, stride_names
from sageLLM.runtime.core.passes.clocks import Clocks


@dataclass(frozen=True, slots=True)
class Location:
    """A strided view of the memory `base`: a weight, an input, or the value that was first written there.

    `offset` and `strides` count elements.
    """

    base: str
    dtype: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = 0


def contiguous(base: str, dtype: str, shape: tuple[Dim, ...]) -> Location:
    """A row-major location from the beginning of the memory."""
    return Location(base, dtype, shape, row_major(shape))


def row_major(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The strides of a contiguous tensor."""
    strides: list[Dim] = []
    step: Dim = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = step * size
    return tuple(strides)


def row_strides(pattern: TypePattern, location: Location) -> tuple[Dim, ...] | None:
    """Strides of all declared dims but the last, with the leading dims merged into one.

    None if a kernel cannot read the layout so: its innermost stride is not 1, or the leading dims do not merge.
    """
    if not location.shape:
        return ()
    if location.shape[-1] != 1 and location.strides[-1] != 1:
        return None
    num_leading = len(location.shape) - len(pattern.trailing)
    if not pattern.has_leading:
        return location.strides[:-1]
    rows = _one_stride(location.shape[:num_leading], location.strides[:num_leading])
    if rows is None:
        return None
    return (rows, *location.strides[num_leading:-1]) if pattern.trailing else ()


def _one_stride(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> Dim | None:
    """The stride of the leading dims merged into one; None if their rows are not equidistant."""
    sized = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(sized):
        if outer != size * inner:
            return None
    return sized[-1][1] if sized else 0


class Aliases:
    """Values that share memory and the last read of each, so that no value is overwritten before its last read."""

    def __init__(self, order: list[ExecutionNode], outputs: Iterable[TensorRef]) -> None:
        self._clocks = Clocks(order)
        self._reads: dict[str, list[int]] = {}
        for i, node in enumerate(order):
            for ref in node.inputs:
                self._reads.setdefault(ref.name, []).append(i)
        self._returned = {ref.name for ref in outputs}
        self._parent: dict[str, str] = {}
        self._children: dict[str, list[str]] = {}

    def record(self, name: str, source: str) -> None:
        """Records that the value shares the memory of `source`, or a part of it."""
        self._parent[name] = source
        self._children.setdefault(source, []).append(name)

    def is_read_after(self, name: str, position: int) -> bool:
        """Whether a node that may run later reads the value, a value that contains it, or a part of it.

        A node of another stream may run later unless the node at `position` waits for it. Sibling parts of the same
        source do not count: they are disjoint from this value.
        """
        return any(one in self._returned or self._has_later_read(one, position) for one in self._family(name))

    def _has_later_read(self, name: str, position: int) -> bool:
        reads = (i for i in self._reads.get(name, ()) if i != position)
        return any(not self._clocks.runs_after(position, i) for i in reads)

    def _family(self, name: str) -> Iterator[str]:
        above: str | None = name
        while above is not None:
            yield above
            above = self._parent.get(above)
        below = list(self._children.get(name, ()))
        while below:
            one = below.pop()
            yield one
            below += self._children.get(one, ())


def part_location(node: OpNode, inference: Inference, part: Part, ref: TensorRef, base: Location) -> Location | None:
    """The location of an output that is a part of the operand at `base`; None if the operand's strides forbid it."""
    pattern = node.input_types[part.base]
    rows = row_strides(pattern, base)
    if rows is None:
        return None
    env = {**inference.env, **dict(zip(stride_names(part.base, pattern), rows, strict=True))}
    if any(evaluate(a, env) != evaluate(b, env) for a, b in part.where):
        return None
    strides = tuple(evaluate(stride, env) for stride in part.strides)
    if pattern.has_leading:  # the formulas have the leading dims merged; the graph has those of the operand
        num_leading = len(base.shape) - len(pattern.trailing)
        strides = (*base.strides[:num_leading], *strides[1:])
    return Location(base.base, ref.dtype, ref.shape, strides, base.offset + evaluate(part.offset, env))
