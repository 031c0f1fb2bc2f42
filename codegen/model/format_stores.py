"""The inverse of a format's value, for written checkpoints: the parts (codes - zeros) * scales.

(bits(w, b, K) - 2 ** (b - 1)) * rep(s, G, K)    codes are fields of `w` around 2 ** (b - 1), scales are `s`
"""

from dataclasses import dataclass

from sageLLM.codegen.model.format import Binary, Bits, FormatDef, Repeat, Stored, Value


@dataclass(frozen=True, slots=True)
class Stores:
    """The parts of a value (codes - zeros) * scales, each of which is a stored tensor or fields of its words.

    `kind` is the width of the codes, as a number or the name of a size, `i8` for bytes, or `f8` for floats. `center`
    is a zero that is equal for all codes.
    """

    kind: str
    codes: Bits | Stored
    center: Value | None
    zeros: Bits | None
    scales: Stored


def stores_of(one: FormatDef) -> Stores | None:
    """The parts, or None for a value of another form, and for one with further tensors."""
    value = one.value
    if not isinstance(value, Binary) or value.op != "*" or one.weight != ("N", "K"):
        return None
    for fine, coarse in ((value.a, value.b), (value.b, value.a)):
        found = _stores(one, fine, coarse)
        if found is not None and {tensor_of(part) for part in _parts(found)} == {tensor.name for tensor in one.tensors}:
            return found
    return None


def _stores(one: FormatDef, fine: Value, coarse: Value) -> Stores | None:
    scales = _base(coarse)
    codes, zeros = (fine.a, fine.b) if isinstance(fine, Binary) and fine.op == "-" else (fine, None)
    kind = _kind(one, codes)
    if not isinstance(scales, Stored) or not isinstance(codes, Bits | Stored) or kind is None:
        return None
    if zeros is None or not zeros.dims:
        return Stores(kind, codes, zeros, None, scales)
    base = _base(zeros)
    return Stores(kind, codes, None, base, scales) if isinstance(base, Bits) and base.width == kind else None


def _parts(found: Stores) -> list[Bits | Stored]:
    return [found.codes, found.scales, *([found.zeros] if found.zeros is not None else [])]


def tensor_of(part: Bits | Stored) -> str:
    stored = part.x if isinstance(part, Bits) else part
    assert isinstance(stored, Stored), "bits are those of a stored tensor"
    return stored.name


def _base(value: Value) -> Value:
    """The value that is repeated."""
    while isinstance(value, Repeat):
        value = value.x
    return value


def _kind(one: FormatDef, value: Value) -> str | None:
    match value:
        case Bits(width=width):
            return width
        case Stored(name=name):
            element = next(tensor.element for tensor in one.tensors if tensor.name == name)
            return element if element in ("i8", "f8") else None
    return None
