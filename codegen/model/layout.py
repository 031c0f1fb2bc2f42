"""Linked layouts: config names with types, weights with their sources, statements bound to ops."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.model.source import PartDef
from sageLLM.codegen.schema.models import ModelFile, Scalar

Phase = Literal["prefill", "decode", "hybrid"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "hybrid")
ConfigType = Literal["size", "int", "float", "bool", "str"]
ListKind = Literal["layers", "list"]


@dataclass(frozen=True, slots=True)
class ConfigName:
    """A config name. `default` is Python text over earlier names, or None if the key is required.

    `items` makes it a list of `type`: with one value per layer (`default` is then that of layer i) or of any length.
    `formula` is the default as written in the layout if evaluating it may fail, else empty. `if_null` is the value of a
    null key if it is not the default, and `texts` has the numbers that stand for texts.
    """

    name: str
    keys: tuple[str, ...]
    type: ConfigType
    is_optional: bool
    default: str | None
    value: Scalar
    doc: str
    items: ListKind | None = None
    formula: str = ""
    if_null: "ConfigName | None" = None
    texts: tuple[tuple[str, int | float], ...] = ()

    @property
    def python_type(self) -> str:
        base = "int" if self.type == "size" else self.type
        if self.items is not None:
            return f"tuple[{base}, ...]"
        return f"{base} | None" if self.is_optional else base

    @property
    def key_text(self) -> str:
        """The key that is read, as Python over the config `c`: known at run time if the name has several."""
        return f"c.key({self.words!r})" if len(self.keys) > 1 else repr(self.words)

    @property
    def words(self) -> str:
        """The name for messages: the key of config.json, else the layout's name."""
        return self.keys[0].removeprefix("/") if self.keys else self.name


@dataclass(frozen=True, slots=True)
class Check:
    """A condition on the config: Python text over names, the same in terms of config.json keys, and the names in it.

    `formula` is the condition as written in the layout if evaluating it may fail, else empty.
    """

    text: str
    words: str
    names: tuple[ConfigName, ...]
    formula: str = ""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on the config and, in a layer, on its index: as written in the layout, and as Python over `c`.

    `index` is the name of the layer index in the Python text, or None if the condition does not depend on the layer.
    """

    source: str
    python: str
    index: str | None = None


@dataclass(frozen=True, slots=True)
class RopeDef:
    """A pair of rotary tables, cos and sin, or cos_NAME and sin_NAME; `keys` and `allow` describe its scaling.

    The base frequency is read from `base_keys`, or is the Python expression `base`, of the spec's text `formula`.
    `default` is the scaling section of a config without one, and `original` its trained length. With `is_partial`, the
    layout reads `partial_rotary_factor`; other layouts reject it. With `reads_theta` it reads `rope_theta` itself; with
    `is_mrope` its configs have `mrope_section`. `read` are further keys of the section that it reads.
    """

    name: str
    layout: Literal["half", "interleaved"]
    base_keys: tuple[str, ...]
    base_default: float | None
    dim: Size
    keys: tuple[str, ...]
    allow: tuple[str, ...]
    default: tuple[tuple[str, Scalar], ...] = ()
    original: int | None = None
    is_partial: bool = False
    base: str = ""
    formula: str = ""
    reads_theta: bool = False
    read: tuple[str, ...] = ()
    is_mrope: bool = False


@dataclass(frozen=True, slots=True)
class ShardDef:
    """Sharding of a weight under tensor parallelism; see `Shard` in the runtime."""

    dim: int
    kind: Literal["rows", "vocab", "first"]
    then: Literal["all_reduce", "all_gather"] | None
    segments: tuple[Size, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightDef:
    """A weight of the model or of a block, and the parts that fill it."""

    name: str
    block: str | None
    is_per_layer: bool
    dims: tuple[Size, ...]
    parts: tuple[PartDef, ...]
    shard: ShardDef | None = None
    tied_to: str | None = None
    tied_when: Condition | None = None
    when: Condition | None = None

    @property
    def type(self) -> ValueType:
        return ValueType("E", self.dims)


@dataclass(frozen=True, slots=True)
class AlibiDef:
    """The table of ALiBi slopes for `heads`; `max_bias` is Python text over the config."""

    heads: str
    max_bias: str


@dataclass(frozen=True, slots=True)
class CacheDef:
    """Heads and width of cached keys and values; with `is_shared` the value is the leading part of the key."""

    k: tuple[Size, Size]
    v: tuple[Size, Size]
    is_shared: bool


@dataclass(frozen=True, slots=True)
class InputDef:
    """A value that the engine provides: per step, per layer, or once (a table).

    `pairs` is the pairing of components that a rotary table is made for.
    """

    name: str
    type: ValueType
    is_per_layer: bool
    pairs: Literal["half", "interleaved"] | None = None


@dataclass(frozen=True, slots=True)
class OpCall:
    """`targets = op(args, attrs)`: args by operand position (None where absent), attrs as Python text over the config.

    `reduce` is the collective that completes the result when weights are sharded over ranks; `shard_op` replaces `op`
    there, for a table of which each rank holds some rows.
    """

    targets: tuple[str, ...]
    op: OpDef
    args: tuple[str | None, ...]
    attrs: tuple[tuple[str, str], ...]
    types: tuple[ValueType, ...]
    reduce: Literal["all_reduce", "all_gather"] | None = None
    shard_op: OpDef | None = None


@dataclass(frozen=True, slots=True)
class Attend:
    """Attention over the KV cache: the store of the new keys and values, then the attention op of the phase."""

    target: str
    store: OpCall
    by_phase: Mapping[Phase, OpCall]

    @property
    def types(self) -> tuple[ValueType, ...]:
        return self.by_phase["prefill"].types


@dataclass(frozen=True, slots=True)
class BlockCall:
    """`targets = block(args)` in the program. `reduced` are the targets that are partial sums over the ranks."""

    targets: tuple[str, ...]
    block: str
    args: tuple[str, ...]
    types: tuple[ValueType, ...]
    reduced: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """Statements that apply if the condition holds; the last branch may have none and then applies otherwise."""

    when: Condition | None
    body: "tuple[Statement, ...]"


@dataclass(frozen=True, slots=True)
class Choose:
    """Alternatives: the first branch with a true condition applies, decided when the graph is built."""

    branches: tuple[Branch, ...]


Statement = OpCall | Attend | BlockCall | Choose


def plain_statements(body: "Iterable[Statement]") -> "Iterator[OpCall | Attend | BlockCall]":
    """The statements of a body, including those of all branches."""
    for statement in body:
        if isinstance(statement, Choose):
            for branch in statement.branches:
                yield from plain_statements(branch.body)
        else:
            yield statement


@dataclass(frozen=True, slots=True)
class BlockDef:
    """A block: its arguments, statements, results and weights."""

    name: str
    summary: str
    op_types: Mapping[Phase, str]
    args: Mapping[str, ValueType]
    body: tuple[Statement, ...]
    returns: tuple[str, ...]
    result_types: tuple[ValueType, ...]
    partial: tuple[bool, ...]
    weights: tuple[WeightDef, ...]
    lines: tuple[str, ...]

    @property
    def uses_kv(self) -> bool:
        return any(isinstance(statement, Attend) for statement in plain_statements(self.body))


@dataclass(frozen=True, slots=True)
class Repeat:
    """The loop over the layers."""

    count: str
    index: str
    carry: tuple[str, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Results:
    """The program's values that embeddings are computed from; see `ModelLayout` in the runtime."""

    hidden: str | None
    pooled: str | None


@dataclass(frozen=True, slots=True)
class CheckpointDef:
    """The checkpoints that a layout reads; see `ModelLayout` in the runtime. `is_flat`: `root` may be absent."""

    architectures: tuple[str, ...]
    root: str
    is_flat: bool
    model_types: tuple[str, ...]
    prefix: str
    outer_prefix: str
    renamed: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ModelDef:
    """One linked layout; a layout that extends another one is complete here.

    `base` is the layout that it extends, `sources` are all layouts that parts of it come from.
    """

    name: str
    entry: Entry[ModelFile]
    base: Entry[ModelFile] | None
    sources: tuple[Entry[ModelFile], ...]
    summary: str
    checkpoints: CheckpointDef
    config: Mapping[str, ConfigName]
    checks: tuple[Check, ...]
    ropes: tuple[RopeDef, ...]
    alibi: AlibiDef | None
    cache: CacheDef
    divides: tuple[str, ...]
    weights: tuple[WeightDef, ...]
    blocks: Mapping[str, BlockDef]
    program: tuple[Statement | Repeat, ...]
    returns: tuple[str, ...]
    results: Results
    phases: tuple[Phase, ...]
    inputs: Mapping[str, InputDef]
    ignore: tuple[str, ...]
    tiny: Mapping[str, object]
    join: OpDef | None

    @property
    def ref(self) -> str:
        return self.entry.ref

    @property
    def ops_called(self) -> list[str]:
        """The ops that the program and its blocks call, in the order of their first call."""
        bodies = [*(block.body for block in self.blocks.values()), self.program]
        return list(dict.fromkeys(op.name for body in bodies for op in _ops_of(body)))


def _ops_of(body: Iterable[Statement | Repeat]) -> Iterator[OpDef]:
    for item in body:
        match item:
            case Repeat():
                yield from _ops_of(item.body)
            case Choose():
                for branch in item.branches:
                    yield from _ops_of(branch.body)
            case Attend():
                yield from (item.store.op, *(call.op for call in item.by_phase.values()))
            case OpCall():
                yield item.op
