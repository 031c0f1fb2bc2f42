"""Lifetimes of values: the buffers of a graph, shared by in-place ops and views, and when each is in use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.ir.dims import Dim, evaluate, product
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.passes.clocks import Clocks
from sageLLM.runtime.core.passes.effects import is_on_device

Sizes = Mapping[str, Dim]


class Buffer(NamedTuple):
    """Memory of one value, or of several that share it, from the position `first` to `last` of the order.

    The range includes every node that may run at the same time as a node that uses the values, on any lane. With
    several lanes, `lane` is the lane number of the first node, and `after` has for each lane the first position from
    which nodes surely run after the buffer is released.
    """

    names: tuple[str, ...]
    device_id: int
    size: int
    first: int
    last: int
    lane: int = 0
    after: tuple[int, ...] = ()

    def interferes_with(self, other: Buffer) -> bool:
        """Whether both may be live at the same time on one device, so that they must not share memory."""
        if self.device_id != other.device_id or self.first > other.last or other.first > self.last:
            return False
        return not (self._is_free_before(other) or other._is_free_before(self))

    def _is_free_before(self, other: Buffer) -> bool:
        return bool(self.after) and other.first >= self.after[other.lane]


class Lifetimes:
    """The buffers of a graph, computed once; `buffers(sizes)` returns them with the sizes of a step."""

    def __init__(self, graph: ExecutionGraph) -> None:
        order = graph.topological_sort()
        self.source = find_sources(order)
        self._types: list[tuple[tuple[str, tuple[Dim, ...]], ...]] = []
        self._buffers: list[Buffer] = []
        clocks = Clocks(order)
        used_at = _positions(order)
        returned = {ref.name for ref in graph.outputs}
        for refs in self._groups(order):
            self._types.append(tuple(dict.fromkeys((ref.dtype, ref.shape) for ref in refs)))
            names = tuple(ref.name for ref in refs)
            positions = [i for name in names for i in used_at[name]]
            is_returned = not returned.isdisjoint(names)
            self._buffers.append(_buffer(names, refs[0].device_id, positions, clocks, is_returned=is_returned))

    def buffers(self, sizes: Sizes, align: int) -> list[Buffer]:
        """The buffers with their sizes in bytes, rounded up to multiples of `align`; IRError if a size is missing."""
        known: dict[tuple[str, tuple[Dim, ...]], int] = {}
        found = []
        for buffer, types in zip(self._buffers, self._types, strict=True):
            for type_ in types:
                if type_ not in known:
                    known[type_] = -(-_num_bytes(*type_, sizes) // align) * align
            size = max(known[type_] for type_ in types)  # values that share memory may be views of different sizes
            found.append(buffer._replace(size=size))
        return found

    def _groups(self, order: list[ExecutionNode]) -> Iterator[list[TensorRef]]:
        """The values that nodes produce, grouped by memory, without those in the caller's memory."""
        home: dict[str, str] = {}
        groups: dict[str, list[TensorRef]] = {}
        for node in order:
            for ref in node.outputs:
                source = self.source.get(ref.name)
                home[ref.name] = ref.name if source is None else home.get(source, source)
                groups.setdefault(home[ref.name], []).append(ref)
        # A group with a source that no node produces is in the memory of an input or a weight.
        return (refs for name, refs in groups.items() if name == refs[0].name)


def find_sources(order: list[ExecutionNode]) -> dict[str, str]:
    """Maps each value in the memory of another (a view of it, or computed in place) to the name of that other value.

    Keys and values that a block loads from the device's own tier are in the cache itself.
    """
    sources: dict[str, str] = {}
    for node in order:
        if not isinstance(node, OpNode):
            if is_on_device(node):
                sources |= {ref.name: node.inputs[0].name for ref in node.outputs}
            continue
        if node.is_view:
            sources |= {ref.name: node.inputs[0].name for ref in node.outputs}
        for output, operand in node.inplace.items():
            if (ref := node.optional_input(operand)) is not None:
                sources[node.output(output).name] = ref.name
    return sources


def _positions(order: list[ExecutionNode]) -> dict[str, list[int]]:
    """The positions at which each value that a node produces is produced and read."""
    found: dict[str, list[int]] = {}
    for i, node in enumerate(order):
        for ref in node.inputs:
            if ref.name in found:
                found[ref.name].append(i)
        for ref in node.outputs:
            found[ref.name] = [i]  # an unused result needs memory as well, while its node runs
    return found


def _buffer(
    names: tuple[str, ...], device_id: int, positions: list[int], clocks: Clocks, *, is_returned: bool
) -> Buffer:
    first = min(positions)
    lane = clocks.lane_of[first]
    if is_returned:
        return Buffer(names, device_id, 0, first, clocks.never, lane)
    if len(clocks.lanes) == 1:  # positions are times, so clocks are not needed
        return Buffer(names, device_id, 0, first, max(positions))
    after = clocks.after_all(positions)
    last = max(*positions, clocks.last_concurrent(after))
    return Buffer(names, device_id, 0, first, last, lane, after)


def _num_bytes(dtype: str, shape: tuple[Dim, ...], sizes: Sizes) -> int:
    size = evaluate(product(shape), sizes)
    if not isinstance(size, int):
        raise IRError(f"the size of a value {dtype}{list(shape)} is symbolic; bind {size}")
    return size * DTYPES[dtype]
