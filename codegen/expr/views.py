"""Views of operands: their text form, and whether views of an output tile it."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.size import LEADING, Size, is_never_negative, volume
from sageLLM.codegen.expr.syntax import Text
from sageLLM.codegen.expr.tree import Slice, View
from sageLLM.codegen.expr.types import ValueType, parse_dim, split_dims


def parse_view(
    text: Text,
    name: str,
    operands: Mapping[str, ValueType],
    dims: Mapping[str, object],
    known: Collection[Size] = (),
) -> View:
    """`gu[T, 0:I]`, `x[T, 1:D:2]` or `x[T, N, D] as [T, N*D]`; raises Refused otherwise.

    `operands` includes the views that are declared before. `known` are sizes that the op's conditions guarantee to be
    non-negative: D - Dr, for `where: [Dr <= D]`.
    """
    base, inside, shape_text = _view_parts(text)
    if base.value not in operands:
        raise base.refuse("SAGE117", f"unknown operand '{base.value}'", None, did_you_mean(base.value, operands))
    base_type = operands[base.value]
    parts = split_dims(inside)
    if len(parts) != len(base_type.dims):
        message = f"a view must name the {len(base_type.dims)} dims of '{base.value}': {base_type}, got {len(parts)}"
        raise text.refuse("SAGE117", message, None, "write one dim or slice for each, such as x[T, 0:H]")
    slices = tuple(_slice(part, dim, dims, known) for part, dim in zip(parts, base_type.dims, strict=True))
    sliced = tuple(part.length if part else dim for part, dim in zip(slices, base_type.dims, strict=True))
    shape = tuple(parse_dim(part, dims) for part in split_dims(shape_text)) if shape_text else None
    if shape is not None and volume(shape) != volume(sliced):
        shapes = " and ".join(f"[{', '.join(map(str, dims))}]" for dims in (sliced, shape))
        message = f"a reshape must keep the number of elements, got {shapes}"
        raise text.refuse("SAGE117", message, None, "write the dims of the slice, merged or split: [T, N*D]")
    return View(
        name, base.value, base_type, slices, shape, ValueType(base_type.element, sliced if shape is None else shape)
    )


def _view_parts(text: Text) -> tuple[Text, Text, Text | None]:
    value = text.value
    opening, closing = value.find("["), value.find("]")
    rest = value[closing + 1 :].strip()
    is_reshaped = rest.startswith("as ") and rest.endswith("]") and rest[3:].lstrip().startswith("[")
    if opening < 1 or closing < opening or (rest and not is_reshaped):
        help = 'write for example "x[T, 0:I]" or "x[T, N, D] as [T, N*D]"'
        raise text.refuse("SAGE117", f"expected a view, got '{value}'", None, help)
    shape = text.part(value.index("[", closing) + 1, value.rindex("]")) if rest else None
    return text.part(0, len(value[:opening].rstrip())), text.part(opening + 1, closing), shape


def _slice(part: Text, dim: Size, dims: Mapping[str, object], known: Collection[Size]) -> Slice | None:
    if ":" not in part.value:
        if parse_dim(part, dims) != dim:
            message = f"expected the dim {dim} of the operand or a slice of it, got {part.value}"
            raise part.refuse("SAGE117", message, None, f"write {dim}, or a:b")
        return None
    cuts = [-1, *(i for i, letter in enumerate(part.value) if letter == ":"), len(part.value)]
    start, stop, *steps = (parse_dim(part.trimmed_part(a + 1, b), dims) for a, b in pairwise(cuts))
    if len(steps) > 1:
        raise part.refuse("SAGE117", f"a slice must be a:b or a:b:step, got {part.value}", None, "write 0:H or 0:H:2")
    step = steps[0] if steps else Size.of(1)
    length = _length(part, start, stop, step, known)
    inside = all(is_never_negative(size, known) for size in (start, dim - stop, length))
    if not inside or dim == LEADING:
        message = f"the slice {part.value} must be inside the dim {dim}"
        raise part.refuse("SAGE117", message, None, f"required: 0 <= start <= stop <= {dim}")
    return Slice(start, stop, step, length)


def _length(part: Text, start: Size, stop: Size, step: Size, known: Collection[Size]) -> Size:
    """The number of components. Division is exact, as everywhere: `0:D:2` states that D is even.

    A start before the first step, such as `1:D:2`, does not change the number; the same holds for the numbers within a
    step of known size, as in `Dr + 1:D:2`.
    """
    if step == Size.of(1):
        return stop - start
    if not step.is_never_negative or not step.terms:
        message = f"the step of a slice must be at least 1, got {part.value}"
        raise part.refuse("SAGE117", message, None, "write for example 0:H:2")
    whole = stop - start
    if is_never_negative(step - start - Size.of(1), known):
        whole = stop
    elif step.constant is not None:
        whole = stop - start + Size.of(start.constant_term % step.constant)
    length = whole.quotient(step)
    if length is None:
        help = f"{whole} must be a multiple of {step}; for a start within a step add `where: [start < {step}]`"
        raise part.refuse("SAGE117", f"the slice {part.value} must have a known number of steps", None, help)
    return length


def tiles(parts: Sequence[View], whole: ValueType) -> bool:
    """Whether the views, all sliced along the same dim (or a single whole view), cover the tensor exactly once."""
    cut = tile_axis(parts)
    if cut is None:
        return len(parts) == 1 and not any(parts[0].slices)
    at = Size.of(0)
    for group in grouped_parts(parts, cut):
        found = [part.slices[cut] for part in group]
        first = found[0]
        starts = [one.start for one in found if one is not None]
        if first is None or starts != [at + Size.of(i) for i in range(first.step.constant or 0)]:
            return False
        at = first.stop
    return at == whole.dims[cut]


def tile_axis(parts: Sequence[View]) -> int | None:
    """The one dim along which the views are slices, or None."""
    cuts = {axis for part in parts for axis, cut in enumerate(part.slices) if cut is not None}
    return cuts.pop() if len(cuts) == 1 else None


def grouped_parts(parts: Sequence[View], axis: int) -> list[list[View]]:
    """The views in order along the axis, each starting where another one stops; those with a step form one group."""
    groups: dict[Size, list[View]] = {}
    stops: dict[Size, Size] = {}
    for part in parts:
        cut = part.slices[axis]
        assert cut is not None, "every part must be sliced along the axis"
        groups.setdefault(cut.base, []).append(part)
        stops[cut.base] = cut.stop
    ordered, at = [], Size.of(0)
    while at in groups:
        ordered.append(sorted(groups.pop(at), key=lambda part: _offset(part, axis)))
        at = stops[at]
    return ordered if not groups else [[part] for part in parts]


def _offset(part: View, axis: int) -> int:
    cut = part.slices[axis]
    return cut.offset if cut is not None else 0
