"""Derives the segments of a sharded dim: runs such as q, k and v, each of which is divided over the ranks separately.

A dim has several segments if it is concatenated from several sources, or rearranged with an outer axis that is not
divided over the ranks.
"""

from collections.abc import Callable, Iterable

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.model.source import PartDef

IsDivided = Callable[[Size], bool]


def derived_segments(parts: Iterable[PartDef], dim: int, is_divided: IsDivided) -> tuple[Size, ...] | None:
    """The segments that follow from the parts, or None where a packed tensor does not determine them."""
    by_offset: dict[Size, tuple[Size, ...] | None] = {}
    for part in parts:
        if part.stacked is not None and part.stacked_dim == dim:
            return (Size.symbol(part.stacked),)
        by_offset.setdefault(part.at[dim], _segments_of(part, dim, is_divided))
    found: list[Size] = []
    for segments in by_offset.values():
        if segments is None:
            return None
        found += segments
    return tuple(found)


def _segments_of(part: PartDef, dim: int, is_divided: IsDivided) -> tuple[Size, ...] | None:
    group = part.groups[dim]
    first = next((n for n, axis in enumerate(group) if is_divided(part.lengths[axis])), None)
    if first is None:
        return (part.size[dim],)
    count = part.group_size(group[:first]).constant
    if count is None or not _is_single(part.lengths[group[first]]):
        return None
    return (part.group_size(group[first:]),) * count


def _is_single(size: Size) -> bool:
    """Whether a divided size is a plain product of dims and so one segment; `2*I` and `Nq + Nkv` may be several."""
    return len(size.terms) == 1 and size.terms[0][1] == 1
