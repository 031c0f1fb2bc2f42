"""The segments of a divided dim: runs such as q, k and v that every rank holds its share of.

A dim that is put together from several sources, or rearranged with an outer axis that ranks do not divide, has several.
"""

from collections.abc import Callable, Iterable

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.model.source import PartDef

IsDivided = Callable[[Size], bool]


def derived_segments(parts: Iterable[PartDef], dim: int, is_divided: IsDivided) -> tuple[Size, ...] | None:
    """The segments that follow from the parts, or None where a packed tensor does not tell."""
    by_place: dict[Size, tuple[Size, ...] | None] = {}
    for part in parts:
        if part.stacked is not None and part.stacked_dim == dim:
            return (Size.symbol(part.stacked),)
        by_place.setdefault(part.at[dim], _segments_of(part, dim, is_divided))
    found: list[Size] = []
    for segments in by_place.values():
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
    if count is None or not _is_one(part.lengths[group[first]]):
        return None
    return (part.group_size(group[first:]),) * count


def _is_one(size: Size) -> bool:
    """Whether a divided size is a product of dims, and so one thing; `2*I` and `Nq + Nkv` are several."""
    return len(size.terms) == 1 and size.terms[0][1] == 1
