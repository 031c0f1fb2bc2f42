"""Codes of formats: a value that is (codes - zeros) * scales, with zeros and scales for groups of inputs.

    (bits(qweight, 4, K) - rep(zeros, G, K)) * rep(scales, G, K)     codes of 4 bits, zeros, scales; groups of G
    lut(bits(blocks, 4, B), E2M1) * e8m0(scales)                      codes of FP4; groups of B
    weight * rep(rep(weight_scale, P, N), Q, K)                       codes of FP8; groups of Q
    d * rep(scales, 32, B) * codes - dmin * rep(minima, 32, B)        scales and minima with factors
    lut(codes, E2M1) * rep(scales / factor, 16, K)                    scales with a divisor
    d * codes + m                                                     scales and offsets in f16

Kernels on packed weights read these parts, which are moved from the checkpoint without computing a weight.
"""

from dataclasses import dataclass, field, replace

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


_BY_GROUP = ("zeros", "minima", "offsets")


class _NotCodes(Exception):
    """The value has another form."""


@dataclass(frozen=True, slots=True)
class _Parts:
    codes: Value
    form: str
    zeros: Value | None = None
    scales: tuple[Value, ...] = field(default=())
    minima: tuple[Value, ...] = field(default=())
    offsets: Value | None = None


def codes_of(one: FormatDef) -> Codes | None:
    """The parts of the format's value, or None if it has another form."""
    try:
        parts = _Splitter(one).split(one.value)
        scales, factors = _scaled(parts.scales)
        found = {"codes": parts.codes, "scales": scales}
        if parts.zeros is not None and (parts.zeros.dims or not parts.minima):
            found["zeros"] = parts.zeros
        if factors is not None:
            found["factors"] = factors
        if parts.minima:
            found["minima"], minimum_factors = _scaled(parts.minima)
            if minimum_factors is None or factors is None or parts.zeros is not None:
                return None
            found["minimum_factors"] = minimum_factors
        if parts.offsets is not None:
            if set(found) != {"codes", "scales"} or not all(map(_Splitter(one).is_half, (scales, parts.offsets))):
                return None
            found["offsets"] = parts.offsets
        by_group = [value for name, value in found.items() if (name in _BY_GROUP and value.dims) or value is scales]
        groups = {_group(one, value) for value in by_group}
    except _NotCodes:
        return None
    if len(groups) != 1:
        return None
    return Codes(parts.form, groups.pop(), found, _index(one))


def _scaled(product: tuple[Value, ...]) -> tuple[Value, Value | None]:
    """The scale of each group, and its factor or divisor. They are moved as they are: a product would be rounded."""
    match product:
        case (Binary(op="/", a=Stored() as scale, b=Stored(dims=()) as divisor),):
            return scale, divisor
        case (Stored(kind="float") as scale, Constant() as number):  # as bitsandbytes has 1 / 127
            return Binary("float", scale.dims, "*", scale, number), None
        case (scale,) if isinstance(_rows_of(scale), Stored | PowerOfTwo):
            return scale, None
        case (Stored(kind="float") as factor, scale) | (scale, Stored(kind="float") as factor) if scale.kind == "int":
            return scale, factor
    raise _NotCodes


def _rows_of(value: Value) -> Value:
    """The value without repetitions of its rows, which move it, too."""
    match value:
        case Repeat(x=x, dim="N"):
            return _rows_of(x)
    return value


class _Splitter:
    def __init__(self, one: FormatDef) -> None:
        self.format = one
        self.inner = one.inner or "K"

    def split(self, value: Value) -> _Parts:
        match value:
            case Binary(op="*", a=a, b=b) if value.kind == "float":
                coarse, fine = (a, b) if self.is_coarse(a) else (b, a)
                parts = self.split(fine)
                return replace(parts, scales=(*parts.scales, *self.factors(coarse)))
            case Binary(op="-", kind="int", a=a, b=b) if self.is_coarse(b):
                parts = self.split(a)
                if parts.zeros is not None or parts.scales:
                    raise _NotCodes
                return replace(parts, zeros=self.at_groups(b))
            case Binary(op="-", kind="float", a=a, b=b) if self.is_coarse(b):
                parts = self.split(a)
                if parts.minima:
                    raise _NotCodes
                return replace(parts, minima=self.factors(b))
            case Binary(op="+", kind="float", a=a, b=b) if self.is_coarse(b):
                parts = self.split(a)
                if parts.minima or parts.offsets is not None:
                    raise _NotCodes
                return replace(parts, offsets=self.at_groups(b))
            case Bits(width=width):
                return _Parts(value, width)
            case Binary(kind="int"):
                return _Parts(value, str(_most(value).bit_length()))
            case Stored(name=name):
                element = next(tensor.element for tensor in self.format.tensors if tensor.name == name)
                if element == "f8" or INTEGERS.get(element) == 8:
                    return _Parts(value, element)
            case Lookup(x=Bits() as codes, table=table):
                values = tuple(self.format.spec.tables[table])
                if values == (*E2M1, *(-one for one in E2M1)):
                    return _Parts(codes, "fp4")
        raise _NotCodes

    def factors(self, value: Value) -> tuple[Value, ...]:
        """The factors of a product that is equal for all inputs of a group, with an element per group."""
        if not self.is_coarse(value):
            raise _NotCodes
        match value:
            case Binary(op="*", a=a, b=b):
                return (*self.factors(a), *self.factors(b))
        return (self.at_groups(value),)

    def is_coarse(self, value: Value) -> bool:
        """Whether the value is equal for all inputs of a group."""
        match value:
            case Repeat(dim=dim) | Take(dim=dim) if dim == self.inner:
                return True
            case Constant():
                return True
            case Binary(a=a, b=b):
                return self.is_coarse(a) and self.is_coarse(b)
        return all(extent.dim != self.inner for extent in value.dims) and not any(
            isinstance(part, Lookup) for part in walk(value)
        )

    def is_half(self, value: Value) -> bool:
        """Whether the value is a stored number in float16."""
        elements = {tensor.name: tensor.element for tensor in self.format.tensors}
        return isinstance(value, Stored) and elements[value.name] == "f16"

    def at_groups(self, value: Value) -> Value:
        """The value with an element per group."""
        match value:
            case Repeat(x=x, dim=dim) | Take(x=x, dim=dim) if dim == self.inner:
                return x
        return value


def _most(value: Value) -> int:
    """The largest value of an integer made of fields, which are at least 0."""
    match value:
        case Bits(width=width) if width.isdecimal():
            return int(2 ** int(width) - 1)
        case Constant(text=text) if text.isdecimal():
            return int(text)
        case Binary(op="+", a=a, b=b):
            return _most(a) + _most(b)
        case Binary(op="*", a=a, b=b):
            return _most(a) * _most(b)
    raise _NotCodes


def _group(one: FormatDef, value: Value) -> str:
    """The size, or the number, of inputs of a group; empty for all inputs."""
    along = [extent for extent in value.dims if extent.dim == (one.inner or "K")]
    along = along or [extent for extent in value.dims if extent.dim == "K"]
    if not along:
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
