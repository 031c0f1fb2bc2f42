"""Where every value of a graph lies: in which memory, from which element on, and with which strides.

Offsets and strides are formulas of the step's sizes. Views and what is made in place lie in another value's memory, so
they cost no call: only their addresses and strides differ.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sageLLM.runtime.core.ir.dims import Dim, evaluate
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Inference, OpNode
from sageLLM.runtime.core.ir.types import TypePattern
from sageLLM.runtime.core.kernels import Part, stride_names


@dataclass(frozen=True, slots=True)
class Place:
    """`offset` and `strides` count elements. `base` names memory: a weight, an input, or the value first made there."""

    base: str
    dtype: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = 0


def contiguous(base: str, dtype: str, shape: tuple[Dim, ...]) -> Place:
    """Row after row, from the beginning of the memory."""
    return Place(base, dtype, shape, row_major(shape))


def row_major(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The strides of a contiguous tensor."""
    strides: list[Dim] = []
    step: Dim = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = step * size
    return tuple(strides)


def row_strides(pattern: TypePattern, place: Place) -> tuple[Dim, ...] | None:
    """Strides of all declared dims but the last, leading dims as one; None if a kernel cannot be told the layout so."""
    if not place.shape:
        return ()
    if place.shape[-1] != 1 and place.strides[-1] != 1:
        return None
    num_leading = len(place.shape) - len(pattern.trailing)
    if not pattern.has_leading:
        return place.strides[:-1]
    rows = _one_stride(place.shape[:num_leading], place.strides[:num_leading])
    if rows is None:
        return None
    return (rows, *place.strides[num_leading:-1]) if pattern.trailing else ()


def _one_stride(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> Dim | None:
    """The stride of leading dims taken as one; None if their rows do not lie at equal distances."""
    sized = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(sized):
        if outer != size * inner:
            return None
    return sized[-1][1] if sized else 0


class Aliases:
    """Which values share memory, and until when each is read, so that nothing is overwritten that is still wanted."""

    def __init__(self, order: Sequence[ExecutionNode], outputs: Iterable[TensorRef]) -> None:
        self._last_read = {ref.name: i for i, node in enumerate(order) for ref in node.inputs}
        self._last_read |= {ref.name: len(order) for ref in outputs}
        self._parent: dict[str, str] = {}
        self._children: dict[str, list[str]] = {}

    def note(self, name: str, source: str) -> None:
        """The value lies in the memory of another one, or in a part of it."""
        self._parent[name] = source
        self._children.setdefault(source, []).append(name)

    def is_read_after(self, name: str, position: int) -> bool:
        """Whether a later node reads the value, what it is a part of, or a part of it. Its sisters are other parts."""
        return any(self._last_read.get(one, -1) > position for one in self._family(name))

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


def part_place(node: OpNode, inference: Inference, part: Part, ref: TensorRef, base: Place) -> Place | None:
    """Where an output lies that is a part of the operand at `base`; None if the operand's strides do not allow that."""
    pattern = node.input_types[part.base]
    rows = row_strides(pattern, base)
    if rows is None:
        return None
    env = {**inference.env, **dict(zip(stride_names(part.base, pattern), rows, strict=True))}
    if any(evaluate(a, env) != evaluate(b, env) for a, b in part.where):
        return None
    strides = tuple(evaluate(stride, env) for stride in part.strides)
    if pattern.has_leading:  # they stand as one in the formulas; in the graph they are the operand's
        num_leading = len(base.shape) - len(pattern.trailing)
        strides = (*base.strides[:num_leading], *strides[1:])
    return Place(base.base, ref.dtype, ref.shape, strides, base.offset + evaluate(part.offset, env))
