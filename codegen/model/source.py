"""Linked weight sources: checkpoint tensors, rearranged and placed in a weight."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

from sageLLM.codegen.expr.size import Size

T = TypeVar("T")
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PartDef:
    """A checkpoint tensor (its name may contain `{i}` and `{e}`) and the region of the weight that it fills.

    The tensor of `shape` is reshaped to `axes`; of each axis in `take` the range [start, stop) is read; every dim of
    the weight consists of the axes in its group, outermost first, and the part starts `at` this index. `stacked` is the
    size that `{e}` ranges over: the part fills index e of dim `stacked_dim`. With `is_either`, checkpoints have the
    tensor as it is, or with its last two dims swapped.
    """

    hf: str
    shape: tuple[Size, ...]
    axes: tuple[Size, ...]
    groups: Groups
    at: tuple[Size, ...]
    take: tuple[tuple[int, Size, Size], ...] = ()
    stacked: str | None = None
    stacked_dim: int = 0
    is_either: bool = False

    @classmethod
    def whole(cls, hf: str, dims: tuple[Size, ...]) -> "PartDef":
        """A tensor that fills the whole weight unchanged."""
        return cls(hf, dims, dims, tuple((axis,) for axis in range(len(dims))), (Size.of(0),) * len(dims))

    def moved(self, dim: int, by: Size) -> "PartDef":
        """The part, moved along a dim."""
        start = self.at[dim] + by if self.at[dim].terms else by
        return replace(self, at=(*self.at[:dim], start, *self.at[dim + 1 :]))

    def transposed(self) -> "PartDef":
        """The part of the weight with its last two dims swapped."""
        last = len(self.groups) - 1
        stacked_dim = {last: last - 1, last - 1: last}.get(self.stacked_dim, self.stacked_dim)
        return replace(self, groups=_swapped(self.groups), at=_swapped(self.at), stacked_dim=stacked_dim)

    def stacked_over(self, count: str) -> "PartDef":
        """The part as one of `count` along a new first dim."""
        return replace(self, groups=((), *self.groups), at=(Size.of(0), *self.at), stacked=count, stacked_dim=0)

    @property
    def lengths(self) -> tuple[Size, ...]:
        """The length that is read of each axis."""
        taken = {axis: stop - start for axis, start, stop in self.take}
        return tuple(taken.get(axis, size) for axis, size in enumerate(self.axes))

    @property
    def order(self) -> tuple[int, ...]:
        """The axes in the order of the weight; those of size 1, and those of which one index is read, come last."""
        grouped = [axis for group in self.groups for axis in group]
        return (*grouped, *(axis for axis in range(len(self.axes)) if axis not in grouped))

    @property
    def size(self) -> tuple[Size, ...]:
        """The extent of the part in each dim of the weight."""
        return tuple(self.group_size(group) for group in self.groups)

    def group_size(self, group: Sequence[int]) -> Size:
        sizes = [self.lengths[axis] for axis in group]
        return sizes[0] if len(sizes) == 1 else reduce(lambda product, size: product * size, sizes, Size.of(1))

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is copied unchanged; missing dims of the weight come first and have one index."""
        missing = len(self.groups) - len(self.shape)
        in_order = self.groups == ((),) * missing + tuple((axis,) for axis in range(len(self.shape)))
        return self.axes == self.shape and not self.take and in_order


def _swapped(items: tuple[T, ...]) -> tuple[T, ...]:
    return (*items[:-2], items[-1], items[-2])
