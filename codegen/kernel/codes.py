"""Codes of formats: a value that is (codes - zeros) * scales, with zeros and scales for groups of inputs.

    (bits(qweight, 4, K) - rep(zeros, G, K)) * rep(scales, G, K)     codes of 4 bits, zeros, scales; groups of G
    lut(bits(blocks, 4, B), E2M1) * e8m0(scales)                      codes of FP4; groups of B

Kernels on packed weights read these parts, which are moved from the checkpoint without computing a weight.
"""

from dataclasses import dataclass

from sageLLM.codegen.model.format import (
    INTEGERS,
    Binary,
    Bits,
    Codes,
    Constant,
    FormatDef,
    Lookup,
    PowerOfTwo,
    Repeat,
    Stored,
    Take,
    Value,
    walk,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of FP4 without a sign; a code with the fourth bit has their opposites."""


class _NotCodes(Exception):
    """The value has another form."""


@dataclass(slots=True)
class _Parts:
    codes: Value
    zeros: Value | None
    scales: list[Value]
    form: str


def codes_of(one: FormatDef) -> Codes | None:
    """The parts of the format's value, or None if it has another form."""
    try:
        parts = _Splitter(one).split(one.value)
        if not parts.scales:
            return None
        zeros = parts.zeros if parts.zeros is not None and parts.zeros.dims else None
        groups = {_group(one, value) for value in (*parts.scales, *([zeros] if zeros else []))}
    except _NotCodes:
        return None
    # Scales are moved as they are: a product or a quotient would be rounded to their type.
    if len(groups) != 1 or len(parts.scales) != 1 or not isinstance(parts.scales[0], Stored | PowerOfTwo):
        return None
    return Codes(parts.form, groups.pop(), parts.codes, parts.zeros, parts.scales[0], _index(one))


class _Splitter:
    def __init__(self, one: FormatDef) -> None:
        self.format = one
        self.inner = one.inner or "K"

    def split(self, value: Value) -> _Parts:
        match value:
            case Binary(op="*", a=a, b=b):
                coarse, fine = (a, b) if self.is_coarse(a) else (b, a)
                parts = self.split(fine)
                return _Parts(parts.codes, parts.zeros, [*parts.scales, self.at_groups(coarse)], parts.form)
            case Binary(op="-", kind="int", a=a, b=b) if self.is_coarse(b):
                parts = self.split(a)
                if parts.zeros is not None or parts.scales:
                    raise _NotCodes
                return _Parts(parts.codes, self.at_groups(b), [], parts.form)
            case Bits(width=width):
                return _Parts(value, None, [], width)
            case Stored(name=name, kind="int"):
                element = next(tensor.element for tensor in self.format.tensors if tensor.name == name)
                if INTEGERS[element] == 8:
                    return _Parts(value, None, [], element)
            case Lookup(x=Bits() as codes, table=table):
                values = tuple(self.format.spec.tables[table])
                if values == (*E2M1, *(-one for one in E2M1)):
                    return _Parts(codes, None, [], "fp4")
        raise _NotCodes

    def is_coarse(self, value: Value) -> bool:
        """Whether the value is equal for all inputs of a group."""
        match value:
            case Repeat(dim=dim) | Take(dim=dim) if dim == self.inner:
                return True
            case Constant():
                return True
        return all(extent.dim != self.inner for extent in value.dims) and not any(
            isinstance(part, Lookup) for part in walk(value)
        )

    def at_groups(self, value: Value) -> Value:
        """The value with an element per group."""
        match value:
            case Repeat(x=x, dim=dim) | Take(x=x, dim=dim) if dim == self.inner:
                return x
        return value


def _group(one: FormatDef, value: Value) -> str:
    """The size, or the number, of inputs of a group; empty for all inputs."""
    if not (along := [extent for extent in value.dims if extent.dim == "K"]):
        return ""
    over, times = along[0].over, along[0].times
    if times or len(over) != 1:
        raise _NotCodes
    [term] = over
    fixed = one.spec.sizes.get(term) if isinstance(term, str) else None
    return str(fixed) if isinstance(fixed, int) else str(term)


def _index(one: FormatDef) -> str:
    """The stored tensor with the group of each input, or empty."""
    for root in (*one.let.values(), one.value):
        for part in walk(root):
            match part:
                case Take(index=Stored(name=name)):
                    return name
    return ""
