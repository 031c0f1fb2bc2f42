"""Aligns the axes of torch tensors with named dims.

A piece of text carries its layout: the dim of each axis of the tensor, or None for an axis of size 1.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sageLLM.codegen.expr.size import LEADING, Size

Layout = tuple[Size | None, ...]


class Piece(NamedTuple):
    """The text of a value with the dims of its axes; the layout of a Python number is empty."""

    text: str
    layout: Layout


def merged(a: Layout, b: Layout) -> Layout | None:
    """The layout after broadcasting in torch, or None if broadcasting by position would not match dims."""
    length = max(len(a), len(b))
    full_a, full_b = ((None,) * (length - len(side)) + side for side in (a, b))
    if LEADING in (*full_a[1:], *full_b[1:]):
        return None
    if LEADING in a and LEADING in b and len(a) != len(b):
        return None
    pairs = list(zip(full_a, full_b, strict=True))
    if any(x is not None and y is not None and x != y for x, y in pairs):
        return None
    joined = tuple(x if x is not None else y for x, y in pairs)
    named = [dim for dim in joined if dim is not None]
    return joined if len(set(named)) == len(named) else None


def aligned(piece: Piece, dims: Iterable[Size]) -> Piece:
    """The piece with one axis per dim of `dims`, in that order, of size 1 for a dim that it does not have."""
    ordered = tuple(dims)
    have = tuple(dim for dim in piece.layout if dim is not None)
    target = tuple(dim if dim in have else None for dim in ordered)
    first = next((i for i, dim in enumerate(target) if dim is not None), len(target))
    if piece.layout in (target, target[first:]) or not piece.layout:
        return piece
    order = tuple(dim for dim in ordered if dim in have)
    text = f"({piece.text})"
    if None in piece.layout:
        text += _index(0 if dim is None else dim for dim in piece.layout)
    if order != have:
        text += _reordered(have, order)
    if len(order) < len(target[first:]):
        text += _index(target[first:])
    return Piece(text, target[first:])


def _reordered(have: Sequence[Size], order: Sequence[Size]) -> str:
    """`.permute(1, 0)`, or `.movedim((-1, -2), (-2, -1))` if there are leading dims, of an unknown number."""
    if LEADING not in have:
        return f".permute({', '.join(str(have.index(dim)) for dim in order)})"
    moved = [dim for dim in order if dim != LEADING and have.index(dim) != order.index(dim)]
    ends = (f"({', '.join(str(dims.index(dim) - len(dims)) for dim in moved)})" for dims in (have, order))
    return f".movedim({', '.join(ends)})"


def _index(axes: Iterable[Size | int | None]) -> str:
    parts = ["..." if axis == LEADING else "None" if axis is None else "0" if axis == 0 else ":" for axis in axes]
    while parts and parts[-1] == ":" and "..." not in parts:
        parts.pop()
    return f"[{', '.join(parts)}]" if parts else ""


def squeezed(piece: Piece, dims: Iterable[Size]) -> Piece:
    """The piece with exactly the axes of `dims`."""
    target = tuple(dims)
    return piece if piece.layout == target else aligned(piece, target)
