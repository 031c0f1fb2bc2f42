"""Index arithmetic of views: positions in a view as positions in its operand."""

from collections.abc import Mapping, Sequence

from sageLLM.codegen.expr.size import Size, volume
from sageLLM.codegen.expr.tree import View
from sageLLM.codegen.kernel.rows import Affine

Positions = Mapping[Size, Affine]
"""The position along each dim that is in scope."""


class LoweringError(Exception):
    """Raised for an op without a row program; the message is the reason."""


def position(dim: Size, positions: Positions) -> Affine:
    if dim in positions:
        return positions[dim]
    if dim == Size.of(1):
        return Affine(Size.of(0))
    raise LoweringError(f"no loop iterates over {dim}")


def base_index(view: View, positions: Positions) -> tuple[Affine, ...]:
    """The index into the base for the element of the view at `positions`."""
    sliced = tuple(cut.length if cut else dim for cut, dim in zip(view.slices, view.base_type.dims, strict=True))
    if view.shape is None:
        inside = [position(dim, positions) for dim in sliced]
    else:
        inside = _unshaped(sliced, view.shape, positions)
    return tuple(
        at if cut is None else Affine(cut.start) + at.scaled(cut.step)
        for cut, at in zip(view.slices, inside, strict=True)
    )


def _unshaped(sliced: Sequence[Size], shape: Sequence[Size], positions: Positions) -> list[Affine]:
    """The positions along the sliced dims for the positions along the dims of the view's shape."""
    found: list[Affine] = []
    for parts, wholes in groups(sliced, shape):
        if len(parts) == 1:
            found.append(joined([(dim, position(dim, positions)) for dim in wholes]))
        else:
            found += [position(dim, positions) for dim in parts]
    return found


def groups(sliced: Sequence[Size], shape: Sequence[Size]) -> list[tuple[tuple[Size, ...], tuple[Size, ...]]]:
    """Runs of dims that a reshape maps to each other: ((N*D,), (N, D)) is split, ((N, D), (N*D,)) is merged."""
    found = []
    i = j = 0
    while i < len(sliced) or j < len(shape):
        i_stop, j_stop = _shortest_run(sliced[i:], shape[j:])
        found.append((tuple(sliced[i : i + i_stop]), tuple(shape[j : j + j_stop])))
        i, j = i + i_stop, j + j_stop
    return found


def _shortest_run(sliced: Sequence[Size], shape: Sequence[Size]) -> tuple[int, int]:
    """The shortest prefixes of both sides that have the same number of elements, as numbers of dims."""
    runs = [
        (i, j) for i in range(len(sliced) + 1) for j in range(len(shape) + 1) if i + j > 0 and min(i, 1) + min(j, 1)
    ]
    for i, j in sorted(runs, key=lambda run: (run[0] + run[1] == 1, run[0] + run[1])):
        if volume(sliced[:i]) == volume(shape[:j]) and (i == 1 or j <= 1):
            return i, j
    raise LoweringError("a view splits and merges the same dims at once")


def joined(dims: Sequence[tuple[Size, Affine]]) -> Affine:
    """The position along the product of dims: n*D + d."""
    at = Affine(Size.of(0))
    for dim, inner in dims:
        at = at.scaled(dim) + inner
    return at


def merged_dims(view: View) -> dict[Size, tuple[Size, ...]]:
    """The dims of the view that merge several of the base: {N*D: (N, D)}."""
    if view.shape is None:
        return {}
    sliced = tuple(cut.length if cut else dim for cut, dim in zip(view.slices, view.base_type.dims, strict=True))
    return {wholes[0]: parts for parts, wholes in groups(sliced, view.shape) if len(parts) > 1 and len(wholes) == 1}
