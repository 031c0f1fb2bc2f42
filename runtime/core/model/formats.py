"""Declaration of quantisation methods in generated code: formats of weights, and the settings that select them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from sageLLM.runtime.core.model.gguf import Architecture
from sageLLM.runtime.core.model.gguf_recipe import Recipe

Setting = str | int | bool | None
Term = str | int
"""A number, or the name of a size."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The elements of a stored tensor along `dim`: the size of the dim times `times` over `over`, rounded up."""

    dim: str
    times: tuple[Term, ...] = ()
    over: tuple[Term, ...] = ()

    def __mul__(self, term: Term) -> Extent:
        return Extent(self.dim, (*self.times, term), self.over)

    def __truediv__(self, term: Term) -> Extent:
        return Extent(self.dim, self.times, (*self.over, term))

    def size(self, sizes: Mapping[str, int]) -> int:
        above, below = self._ratio(sizes)
        return -(-sizes[self.dim] * above // below)

    def most(self, size: int, sizes: Mapping[str, int]) -> int:
        """The largest size of the dim with which a tensor has `size` elements along it."""
        above, below = self._ratio(sizes)
        return size * below // above

    @property
    def is_whole(self) -> bool:
        return not self.times and not self.over

    def is_known(self, sizes: Mapping[str, int]) -> bool:
        return all(isinstance(term, int) or term in sizes for term in (*self.times, *self.over))

    def granule(self, sizes: Mapping[str, int]) -> int:
        """The least number of elements of the dim that begins with an element of the tensor."""
        above, below = self._ratio(sizes)
        return -(-below // above)

    def __str__(self) -> str:
        return "".join([self.dim, *(f"*{term}" for term in self.times), *(f"/{term}" for term in self.over)])

    def _ratio(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        above, below = (
            prod(term if isinstance(term, int) else sizes[term] for term in terms) for terms in (self.times, self.over)
        )
        return above, below


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor that is stored for a weight, or a field of its blocks; `element` is a type or `float`.

    `stored` is the last part of its name in files, by default `name`.
    """

    name: str
    element: str
    dims: tuple[Extent, ...]
    stored: str = ""

    @property
    def end(self) -> str:
        """The last part of its name in files."""
        return self.stored or self.name

    def __str__(self) -> str:
        return f"{self.element}[{', '.join(map(str, self.dims)) or '1'}]"


@dataclass(frozen=True, slots=True)
class Nested:
    """Floats that may be stored as bytes: table[byte] * scale + offset, with a scale for each block of elements.

    `table` and `scales` are the last parts of the names of tensors, `block` and `offset` keys of the weight's state.
    The elements of a block are a power of two.
    """

    table: str
    scales: str
    block: str
    offset: str


@dataclass(frozen=True, slots=True)
class Codes:
    """The parts of a value (codes - zeros) * scales, codes * scales - minima, or codes * scales + offsets.

    The function NAME_codes moves them out of the stored tensors, in the order `parts`. `kind` is the width of the
    codes, as a number or a size, `i8` or `u8` for bytes, `fp4`, or `f8`. `group` is the number of inputs of a scale, or
    its size, empty for all inputs. `index` is the tensor with the group of each input, if any. Integer scales have
    `factors`, and those in f8 divisors; minima are integers with `minimum_factors`. Offsets are in f16, as
    their scales are.
    """

    kind: str
    group: str
    index: str = ""
    parts: tuple[str, ...] = ("codes", "scales")


@dataclass(frozen=True, slots=True)
class BlockCodes:
    """The parts of written blocks: the numbers that share a scale, the names, and the ranges of those in integers."""

    group: int
    parts: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Written:
    """The facts for writing weights of a format; the function NAME_stored makes their tensors.

    `schemes` maps names, such as `int4-g{G}`, to settings. `kind` is the width of the codes, as a number or a size,
    `i8` for bytes or `f8` for floats; `scale` the tensor with the scales, and `rule` their choice (`FormatSpec.scales`
    in `codegen/schema/formats.py`). `shape` is a tensor with the sizes of the weight, if there is one. Of formats in
    blocks, `block` has the parts, and `incomplete` the format of weights with rows of incomplete blocks.
    """

    schemes: Mapping[str, Mapping[str, Setting | tuple[int, ...]]]
    kind: str
    scale: str
    has_zeros: bool
    rule: str
    shape: str | None
    block: BlockCodes | None = None
    incomplete: str | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """A stored form of weights.

    `when` has the accepted values of settings, by key; `sizes` numbers or the keys that have them. The weight has the
    dims `weight`, and is named by `suffix` where its tensors are named by `separator` and their own names. Weights of
    GGUF files are blocks of `block_bytes` bytes. Without `codes` a weight cannot be kept packed. With a
    `state`, the last parts of names of tensors with JSON of which one is stored, tensors are stored flat, `state_sizes`
    are sizes with the keys that have them, and tensors in `nested` may be bytes.
    """

    name: str
    tensors: tuple[StoredPart, ...]
    weight: tuple[str, ...] = ("N", "K")
    when: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)
    sizes: Mapping[str, Term] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    suffix: str = ".weight"
    separator: str = "."
    state: tuple[str, ...] = ()
    state_sizes: Mapping[str, str] = field(default_factory=dict)
    nested: Mapping[str, Nested] = field(default_factory=dict)
    block_bytes: int | None = None
    codes: Codes | None = None
    written: Written | None = None

    def stored_name(self, module: str, end: str) -> str:
        """The name of a tensor of a module in files, by its last part."""
        return f"{module}{self.separator}{end}"


@dataclass(frozen=True, slots=True)
class QuantMethod:
    """A quantisation method: its name in config.json, and its formats, of which the first that fits is used.

    `groups` is the key of sections that each apply to the modules in their `targets`; `skip` are keys with modules that
    are not quantised; `keys` are known keys without an effect on values, of which `writes` are written; `activations`
    is the key of a section that declares the type of activations.
    """

    name: str
    spec: str
    quant_method: str | None
    formats: tuple[Format, ...]
    groups: str | None = None
    skip: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    writes: Mapping[str, Setting] = field(default_factory=dict)
    activations: str | None = None
    architecture_defaults: Architecture = field(default_factory=Architecture)
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
