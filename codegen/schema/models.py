"""Schema of model files: the layout of one model family, complete or as changes to another one."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from sageLLM.codegen.schema.base import Strict
from sageLLM.codegen.schema.sources import DimText, Source, Text, shape_of

Scalar = int | float | bool | str | None
PhaseName = Literal["prefill", "decode", "hybrid"]


def _list_or_not(value: Any) -> str:
    return "list" if isinstance(value, list) else "text"


ListOf = Annotated[list[int | float | bool | str], Tag("list")]
Value = Annotated[Annotated[Scalar, Tag("text")] | ListOf, Discriminator(_list_or_not)]
ConfigTypeName = Literal[
    "int", "float", "bool", "str", "int[L]", "float[L]", "bool[L]", "str[L]", "int[]", "float[]", "bool[]", "str[]"
]  # fmt: skip
Keys = Annotated[Text | Annotated[list[str], Tag("list")], Discriminator(shape_of)]
OpTypes = Annotated[Text | Annotated[dict[PhaseName, str], Tag("mapping")], Discriminator(shape_of)]


class ArchitecturesSpec(Strict):
    """The checkpoints that this layout reads, selected by `architectures` in config.json."""

    architectures: list[str] = Field(min_length=1)
    prefix: str = Field(
        default="", description="common prefix of tensor names; checkpoints of the bare model, without it, are read too"
    )


class ConfigField(Strict):
    """One name of the layout: read from config.json, or fixed by `value`."""

    hf: Keys | None = Field(
        default=None, description="key of config.json, dotted for nested keys, or a list of keys tried in order"
    )
    default: Value = Field(
        default=None, description="value if the key is absent or null; a string is an expression of earlier names"
    )
    value: Value = Field(default=None, description="value fixed by the family: a constant, or a string as in `default`")
    type: ConfigTypeName | None = Field(
        default=None, description="inferred from the default, else int. `str[L]`: one per layer; `int[]`: any length"
    )
    doc: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if ("value" in self.model_fields_set) == (self.hf is not None):
            raise ValueError("a config name must have either `hf: KEY` or `value: CONSTANT`")
        if self.hf is None and "default" in self.model_fields_set:
            raise ValueError("`default` requires `hf: KEY`")
        return self


class BaseFrequency(Strict):
    """Keys of config.json for the rotary base frequency."""

    hf: list[str] = Field(min_length=1)
    default: float


class ScalingSpec(Strict):
    """Keys of config.json for the rotary scaling, and the scaling types that the layout allows."""

    hf: list[str] = Field(min_length=1)
    allow: list[str] = Field(min_length=1)


class RopeSection(Strict):
    """Rotary position embedding (Su et al. 2021): the tables `cos` and `sin`, [P, dim/2]."""

    base: BaseFrequency
    dim: DimText = Field(description="number of rotated components per head; the others are unchanged")
    layout: Literal["half", "interleaved"] = Field(
        default="half",
        description="pairs of components: j and j + dim/2 (op `rope`), or 2j and 2j + 1 (op `rope_interleaved`)",
    )
    scaling: ScalingSpec | None = None


def _rope_form(value: Any) -> str:
    return "one" if isinstance(value, RopeSection) or _has_rope_field(value) else "named"


def _has_rope_field(value: Any) -> bool:
    return not isinstance(value, dict) or bool(RopeSection.model_fields.keys() & value.keys())


RopeForm = Annotated[
    Annotated[RopeSection, Tag("one")] | Annotated[dict[str, RopeSection], Tag("named")], Discriminator(_rope_form)
]


class AlibiSection(Strict):
    """ALiBi (Press et al. 2021): the table `slopes`, [heads]."""

    heads: str = Field(description="config name of the number of query heads")
    max_bias: float | str = Field(
        default=8.0, description="the smallest slope is 2 ** -max_bias; a number or a config name"
    )


class CacheSection(Strict):
    """KV cache of one token in one layer: `[heads, width]` of its key and of its value."""

    k: list[DimText] = Field(default=["Nkv", "D"], min_length=2, max_length=2)
    v: list[DimText] = Field(default=["Nkv", "D"], min_length=2, max_length=2)
    v_of: Literal["k"] | None = Field(
        default=None, description="the value is the leading part of the key and is not stored separately"
    )


class ShardSpec(Strict):
    """Sharding of a weight under tensor parallelism."""

    shard: int | None = Field(default=None, ge=0, description="the dim that is divided over the ranks")
    kind: Literal["rows", "vocab"] = "rows"
    then: Literal["all_reduce", "all_gather"] | None = Field(
        default=None, description="collective that completes the result"
    )
    keep: Literal["first"] | None = Field(
        default=None, description="held by rank 0 only, as the bias of a result that is summed over the ranks"
    )
    segments: list[DimText] | None = Field(
        default=None,
        min_length=1,
        description="sizes along the dim that are divided separately, such as q, k and v of a packed tensor",
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.shard is None) == (self.keep is None):
            raise ValueError("`tp` must have either `shard: DIM` or `keep: first`")
        if self.segments is not None and (self.shard is None or self.kind != "rows"):
            raise ValueError("`segments` requires `shard: DIM`")
        return self


class TiedSpec(Strict):
    """A weight that equals another one, always or under a condition; the checkpoint may then omit its tensor."""

    to: str
    when: str | None = None


class WeightSpec(Strict):
    """One weight; it is per-layer if its checkpoint names contain `{i}`."""

    shape: list[DimText] = Field(max_length=4)
    hf: Source
    tp: ShardSpec | None = None
    tied: TiedSpec | None = None
    when: str | None = Field(default=None, description="condition on the config under which the weight exists")


class BranchSpec(Strict):
    """One branch of a `choose`; the last branch may omit `when` and is then the default."""

    when: str | None = Field(default=None, description="condition on the config and, in a layer, on its index")
    do: list["Line"] = Field(min_length=1)


class ChooseSpec(Strict):
    """Statements that depend on the config or on the layer: the first branch with a true condition applies."""

    choose: list[BranchSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _otherwise_last(self) -> Self:
        if any(branch.when is None for branch in self.choose[:-1]):
            raise ValueError("only the last branch of a `choose` may omit `when`")
        if self.choose[0].when is None:
            raise ValueError("the first branch of a `choose` must have `when`")
        return self


Line = Annotated[Text | Annotated[ChooseSpec, Tag("mapping")], Discriminator(shape_of)]
BranchSpec.model_rebuild()


class PatchSpec(Strict):
    """An edit of inherited statements, anchored at the one statement that begins with a text.

    The text of a `choose` is `when` and its first condition.
    """

    before: str | None = None
    after: str | None = None
    replace: str | None = None
    add: list[Line] | None = None
    with_: list[Line] | None = Field(default=None, alias="with")

    @model_validator(mode="after")
    def _anchored(self) -> Self:
        anchors = [anchor for anchor in (self.before, self.after, self.replace) if anchor is not None]
        if len(anchors) != 1 or not anchors[0].strip():
            raise ValueError("a patch must have one of `before: TEXT`, `after: TEXT` and `replace: TEXT`")
        if (self.replace is not None, self.replace is None) != (self.with_ is not None, self.add is not None):
            raise ValueError("`before` and `after` require `add: [...]`, `replace` requires `with: [...]`")
        return self


class BlockSpec(Strict):
    """A part of a layer that is one block-level node. With `extends`, weights are merged and the rest is replaced."""

    summary: str | None = None
    op_type: OpTypes | None = None
    hf: str | None = Field(default=None, description="prefix of the checkpoint names")
    weights: dict[str, WeightSpec] = Field(default={})
    args: dict[str, str] | None = None
    body: list[Line] | None = Field(default=None, min_length=1)
    returns: list[str] | None = Field(default=None, min_length=1)
    patch: list[PatchSpec] = Field(default=[])


class RepeatSpec(Strict):
    """The loop over the layers. A carried value must have the same type before and after each iteration."""

    repeat: str
    index: str
    carry: list[str] = Field(min_length=1)
    do: list[Line] = Field(min_length=1)


def _statement_kind(value: Any) -> str:
    if isinstance(value, dict):
        return "choose" if "choose" in value else "repeat"
    return "text"


Statement = Annotated[
    Text | Annotated[RepeatSpec, Tag("repeat")] | Annotated[ChooseSpec, Tag("choose")], Discriminator(_statement_kind)
]


class DropBlock(Strict):
    """Weights of an inherited block that this layout removes."""

    weights: list[str] = Field(min_length=1)


class DropSection(Strict):
    """Inherited entries that this layout removes; each one must exist."""

    config: list[str] = Field(default=[])
    checks: list[str] = Field(default=[], description="texts of checks; whitespace is ignored")
    weights: list[str] = Field(default=[])
    blocks: dict[str, DropBlock | None] = Field(default={}, description="`NAME: null` drops the whole block")


class TpSection(Strict):
    """Config sizes that are divided by the tensor parallel degree."""

    divides: list[str] = Field(default=[])


Tiny = Annotated[
    Annotated[Scalar, Tag("text")] | Annotated[list[Scalar], Tag("list")] | Annotated[dict[str, Any], Tag("mapping")],
    Discriminator(shape_of),
]


class ModelTests(Strict):
    """`tiny`: an HF config small enough to build, run and snapshot in tests."""

    tiny: dict[str, Tiny]


class ModelFile(Strict):
    """`specs/models/NAME.yaml`: one layout."""

    schema_: Literal["models/v1"] = Field(alias="schema")
    model: str
    summary: str
    extends: str | None = Field(default=None, description="the base layout, which must not extend another one")
    drop: DropSection | None = None
    hf: ArchitecturesSpec
    config: dict[str, ConfigField] = Field(default={})
    checks: list[str] = Field(default=[])
    rope: RopeForm | None = Field(
        default=None, description="one pair of tables, `cos` and `sin`, or several by name: `cos_NAME`, `sin_NAME`"
    )
    alibi: AlibiSection | None = None
    cache: CacheSection | None = None
    tp: TpSection | None = None
    weights: dict[str, WeightSpec] = Field(default={})
    blocks: dict[str, BlockSpec] = Field(default={})
    program: list[Statement] | None = None
    patch: list[PatchSpec] = Field(default=[], description="edits of the inherited program")
    returns: list[str] | None = None
    hidden: str | None = Field(
        default=None,
        description="in a layout that generates text: the value that embeddings are computed from",
    )
    phases: dict[PhaseName, dict[Literal["attend"], str]] = Field(
        default={}, description="the attention op of each phase, for layouts with `attend`"
    )
    ignore_hf: list[str] = Field(default=[])
    tests: ModelTests
