"""The inverse of a block's value: the fields of a block as expressions of codes, scales and minima.

    scales = cat(s % 64, high % 16 + 16 * (s // 64), B)     s = scales[:4] + 64 * (scales[4:] // 16)
    minima = cat(m % 64, high // 16 + 16 * (m // 64), B)    high = scales[4:] % 16 + 16 * (minima[4:] % 16)

The parts are those of `codes_of`. Each integer part is divided into the fields that it is made of, by the inverse of
one operation at a time; a field is the sum of the terms that parts have in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sageLLM.codegen.model.format import (
    INTEGERS,
    Binary,
    Bits,
    Codes,
    Concat,
    Constant,
    Extent,
    FormatDef,
    Named,
    Stored,
    Value,
)
from sageLLM.codegen.model.format_codes import codes_of

Step = tuple[Literal["+", "%", "//", "from", "to"], int]
"""An operation on a part: one of integers, or the elements from or up to a position."""


@dataclass(frozen=True, slots=True)
class Term:
    """A part after some steps, times a number, in words of `bits` if the field consists of these."""

    part: str
    steps: tuple[Step, ...] = ()
    times: int = 1
    bits: Bits | None = None

    def then(self, *steps: Step) -> "Term":
        return replace(self, steps=(*self.steps, *steps))


@dataclass(frozen=True, slots=True)
class BlockStores:
    """The parts of blocks with their ranges, and the terms of each field.

    `lengths` are the numbers of elements of parts in a block; factors of a whole block are absent there. Codes are
    relative to the zero that all of them have in common.
    """

    codes: Codes
    parts: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int]]
    lengths: Mapping[str, int]
    fields: Mapping[str, tuple[Term, ...]]


class _NotInvertible(Exception):
    """A part has a form without an inverse."""


def block_stores_of(one: FormatDef) -> BlockStores | None:
    """The inverse, or None for a value of another form."""
    codes = codes_of(one)
    if codes is None or one.block_bytes is None or not _is_affine(codes):
        return None
    inverse = _Inverse(one)
    zero = codes.parts.get("zeros")
    center = int(zero.text) if isinstance(zero, Constant) else 0
    parts = {name: value for name, value in codes.parts.items() if name != "zeros"}
    try:
        for name, value in parts.items():
            inverse.store(value, Term(name, (("+", center),) if name == "codes" and center else ()))
        integers = {name: value for name, value in parts.items() if value.kind == "int"}
        ranges = {name: inverse.range_of(value) for name, value in integers.items()}
    except _NotInvertible:
        return None
    if set(inverse.fields) != {tensor.name for tensor in one.tensors}:
        return None
    low, high = ranges["codes"]
    ranges["codes"] = (low - center, high - center)
    lengths = {name: inverse.length_of(value) for name, value in integers.items()}
    fields = {name: tuple(terms) for name, terms in inverse.fields.items()}
    return BlockStores(codes, tuple(parts), ranges, lengths, fields)


def _is_affine(codes: Codes) -> bool:
    """Whether codes are integers, and zeros one number."""
    zero = codes.parts.get("zeros")
    return codes.kind not in ("fp4", "f8") and (zero is None or isinstance(zero, Constant))


@dataclass(slots=True)
class _Inverse:
    format: FormatDef
    fields: dict[str, list[Term]] = field(default_factory=dict)

    def store(self, value: Value, term: Term) -> None:
        """Adds the terms with which `value` is equal to `term`."""
        match value:
            case Named(name=name):
                self.store(self.format.let[name], term)
            case Stored(name=name):
                self.fields.setdefault(name, []).append(term)
            case Bits(x=Stored(name=name)):
                self.fields.setdefault(name, []).append(replace(term, bits=value))
            case Concat(a=a, b=b):
                middle = self.length_of(a)
                self.store(a, term.then(("to", middle)))
                self.store(b, term.then(("from", middle)))
            case Binary(op="-", a=a, b=Constant(text=text)) if text.isdecimal():
                self.store(a, term.then(("+", int(text))))
            case Binary(op="+", a=low, b=Binary(op="*", a=Constant(text=text), b=high)) if text.isdecimal():
                if self.range_of(low) != (0, int(text) - 1):
                    raise _NotInvertible
                self.store(low, term.then(("%", int(text))))
                self.store(high, term.then(("//", int(text))))
            case Binary(op="%", a=Stored() as x, b=Constant()):
                self.store(x, term)
            case Binary(op="//", a=Stored() as x, b=Constant(text=text)) if text.isdecimal():
                self.store(x, replace(term, times=term.times * int(text)))
            case _:
                raise _NotInvertible

    def range_of(self, value: Value) -> tuple[int, int]:
        """The least and the largest integer of an expression."""
        match value:
            case Named(name=name):
                return self.range_of(self.format.let[name])
            case Constant(text=text) if text.isdecimal():
                return int(text), int(text)
            case Bits(width=width) if width.isdecimal():
                return 0, int(2 ** int(width)) - 1
            case Stored(name=name):
                element = next(tensor.element for tensor in self.format.tensors if tensor.name == name)
                if INTEGERS.get(element) == 8:
                    return (0, 255) if element == "u8" else (-128, 127)
            case Concat(a=a, b=b):
                first, second = self.range_of(a), self.range_of(b)
                return min(first[0], second[0]), max(first[1], second[1])
            case Binary(op=op, a=a, b=b):
                return self._result(op, self.range_of(a), self.range_of(b))
        raise _NotInvertible

    def _result(self, op: str, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        match op:
            case "+":
                return a[0] + b[0], a[1] + b[1]
            case "-":
                return a[0] - b[1], a[1] - b[0]
            case "*" if min(*a, *b) >= 0:
                return a[0] * b[0], a[1] * b[1]
            case "%" if a[0] >= 0:
                return 0, b[0] - 1
            case "//" if a[0] >= 0:
                return 0, a[1] // b[0]
        raise _NotInvertible

    def length_of(self, value: Value) -> int:
        """The number of elements in a block."""
        block = self.format.spec.sizes["B"]
        assert isinstance(block, int), "checked when the format is linked"
        inner: list[Extent] = [extent for extent in value.dims if extent.dim == "B"]
        return int(block * inner[0].factor) if inner else 1
