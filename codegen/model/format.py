"""Linked formats: the dims of stored tensors, and typed trees of their values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.formats import FormatsFile, FormatSpec, Setting

INTEGERS = {"u8": 8, "i8": 8, "i32": 32, "i64": 64}
"""Integer element types of stored tensors, and their widths."""
ELEMENTS = (*INTEGERS, "f8", "f16", "bf16", "f32", "float")
"""Element types of stored tensors; `f8` is e4m3, `float` any of f16, bf16 and f32."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The number of elements along a dim: `dim` times `factor`, times the powers of sizes, rounded up."""

    dim: str
    factor: Fraction = Fraction(1)
    powers: tuple[tuple[str, int], ...] = ()

    def scaled(self, factor: Fraction, powers: Mapping[str, int]) -> "Extent":
        merged = dict(self.powers)
        for name, power in powers.items():
            merged[name] = merged.get(name, 0) + power
        return Extent(self.dim, self.factor * factor, tuple(sorted((n, p) for n, p in merged.items() if p)))

    @property
    def is_whole(self) -> bool:
        return self.factor == 1 and not self.powers

    @property
    def times(self) -> list[str | int]:
        return _terms(self.factor.numerator, [(name, power) for name, power in self.powers if power > 0])

    @property
    def over(self) -> list[str | int]:
        return _terms(self.factor.denominator, [(name, -power) for name, power in self.powers if power < 0])

    def __str__(self) -> str:
        above = "*".join([self.dim, *map(str, self.times)])
        return "/".join([above, *map(str, self.over)])


def _terms(number: int, powers: list[tuple[str, int]]) -> list[str | int]:
    names: list[str | int] = [name for name, power in powers for _ in range(power)]
    return names if number == 1 else [*names, number]


Kind = Literal["int", "float"]


@dataclass(frozen=True, slots=True)
class Value:
    """A node of a value's tree. Its dims are in the order of the format's; integers are exact."""

    kind: Kind
    dims: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Stored(Value):
    """A stored tensor, or a field of its blocks."""

    name: str


@dataclass(frozen=True, slots=True)
class Named(Value):
    """An expression of `let`."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant(Value):
    """A number, or the name of a size."""

    text: str


@dataclass(frozen=True, slots=True)
class Binary(Value):
    op: str
    a: Value
    b: Value


@dataclass(frozen=True, slots=True)
class Bits(Value):
    """Fields of `width` bits of each word along `dim`, the lowest first, or in the order of a table.

    Within `run` words, the first fields of all words come before the second ones.
    """

    x: Value
    width: str
    dim: str
    order: str | None
    run: int


@dataclass(frozen=True, slots=True)
class Repeat(Value):
    """Each element `count` times along `dim`, cut to the size of the dim."""

    x: Value
    count: str
    dim: str


@dataclass(frozen=True, slots=True)
class Lookup(Value):
    """The elements of a table at the integers `x`."""

    x: Value
    table: str


@dataclass(frozen=True, slots=True)
class StoredLookup(Value):
    """The elements of a stored table at the integers `x`."""

    x: Value
    table: Value


@dataclass(frozen=True, slots=True)
class PowerOfTwo(Value):
    """2 ** (x - 127) of a byte (e8m0); 255 is NaN."""

    x: Value


@dataclass(frozen=True, slots=True)
class Take(Value):
    """The elements of `x` at the positions `index` along `dim`."""

    x: Value
    index: Value
    dim: str


@dataclass(frozen=True, slots=True)
class Concat(Value):
    """`a` and then `b` along `dim`."""

    a: Value
    b: Value
    dim: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A stored tensor or a field: its element type and dims in the order of the file."""

    name: str
    element: str
    dims: tuple[Extent, ...]

    def __str__(self) -> str:
        return f"{self.element}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True, slots=True)
class Codes:
    """The parts of a value (codes - zeros) * scales, codes * scales - minima, or codes * scales + offsets.

    All but codes have an element per group.

    `kind` is the width of the codes, as a number or the name of a size, `i8` or `u8` for bytes, `fp4`, or `f8`. `group`
    is a number or a size, empty for all inputs. `parts` are codes and scales, and if there are any zeros, factors of
    integer scales, or divisors of others, and minima with factors, or offsets. `index` is the stored tensor with the
    group of each input, if there is one.
    """

    kind: str
    group: str
    parts: Mapping[str, Value]
    index: str = ""


@dataclass(frozen=True, slots=True)
class FormatDef:
    """A format. `dims` is the order of dims in the computation, `weight` that of the result."""

    name: str
    spec: FormatSpec
    weight: tuple[str, ...]
    dims: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    let: Mapping[str, Value]
    value: Value
    block_bytes: int | None = None

    @property
    def when(self) -> dict[str, tuple[Setting, ...]]:
        """The accepted values by key."""
        spec = self.spec.when
        return {key: tuple(one) if isinstance(one, list) else (one,) for key, one in spec.items()}

    @property
    def inner(self) -> str | None:
        """The dim of the positions in a block, if the value is joined from blocks."""
        return next((extent.dim for extent in self.value.dims if extent.dim not in self.weight), None)


@dataclass(frozen=True, slots=True)
class MethodDef:
    """A quantisation method with its formats."""

    entry: Entry[FormatsFile]
    formats: tuple[FormatDef, ...]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def spec(self) -> FormatsFile:
        return self.entry.spec


def parts(value: Value) -> Iterator[Value]:
    """The direct parts of a node."""
    match value:
        case Binary(a=a, b=b) | Concat(a=a, b=b):
            yield from (a, b)
        case Bits(x=x) | Repeat(x=x) | Lookup(x=x) | PowerOfTwo(x=x):
            yield x
        case Take(x=x, index=index):
            yield from (x, index)
        case StoredLookup(x=x, table=table):
            yield from (x, table)


def walk(value: Value) -> Iterator[Value]:
    """The node and all of its parts."""
    yield value
    for part in parts(value):
        yield from walk(part)


def key_of_state(size: str | int) -> str:
    """The key of the weight's state that has a size, empty for other sizes."""
    return size.removeprefix("state.") if isinstance(size, str) and size.startswith("state.") else ""
