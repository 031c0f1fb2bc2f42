"""What a model file may say: the layout of one decoder family, or what it changes in another one."""

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
    """The checkpoints that this layout reads: those whose config.json has one of these `architectures`."""

    architectures: list[str] = Field(min_length=1)
    prefix: str = Field(
        default="", description="begins the tensors' names; checkpoints of the bare model, which lack it, are read too"
    )


class ConfigField(Strict):
    """One name of the layout: read from config.json, or fixed by `value`."""

    hf: Keys | None = Field(
        default=None, description="key of config.json, dotted for nested ones; a list gives fallbacks"
    )
    default: Value = Field(
        default=None, description="when the key is absent or null; text is an expression of earlier names"
    )
    value: Value = Field(default=None, description="what the family fixes: a constant, or text as in `default`")
    type: ConfigTypeName | None = Field(
        default=None, description="inferred from the default; else int. `str[L]`: one per layer; `int[]`: any number"
    )
    doc: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if ("value" in self.model_fields_set) == (self.hf is not None):
            raise ValueError("a config name takes `hf: KEY` or `value: CONSTANT`, one of the two")
        if self.hf is None and "default" in self.model_fields_set:
            raise ValueError("`default` goes with `hf: KEY`; a constant needs none")
        return self


class BaseFrequency(Strict):
    """Where the rotary base frequency stands in config.json."""

    hf: list[str] = Field(min_length=1)
    default: float


class ScalingSpec(Strict):
    """Where the rotary scaling stands in config.json, and which types the runtime computes."""

    hf: list[str] = Field(min_length=1)
    allow: list[str] = Field(min_length=1)


class RopeSection(Strict):
    """Rotary position embedding (Su et al. 2021): the tables `cos` and `sin`, [P, dim/2]."""

    base: BaseFrequency
    dim: DimText = Field(description="how many of a head's components are rotated; `rope` leaves the others")
    layout: Literal["half", "interleaved"] = Field(
        default="half",
        description="component j is paired with j + dim/2 (op `rope`), or 2j with 2j + 1 (op `rope_interleaved`)",
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

    heads: str = Field(description="the config name of the query heads")
    max_bias: float | str = Field(
        default=8.0, description="the slopes go down to 2 ** -max_bias; a number, or a config name"
    )


class CacheSection(Strict):
    """What one layer keeps of one token: `[heads, width]` of its key and of its value."""

    k: list[DimText] = Field(default=["Nkv", "D"], min_length=2, max_length=2)
    v: list[DimText] = Field(default=["Nkv", "D"], min_length=2, max_length=2)
    v_of: Literal["k"] | None = Field(
        default=None, description="the value is the leading part of the key and takes no memory of its own"
    )


class ShardSpec(Strict):
    """What tensor parallelism does with a weight."""

    shard: int | None = Field(default=None, ge=0, description="the dim that is divided over the ranks")
    kind: Literal["rows", "vocab"] = "rows"
    then: Literal["all_reduce", "all_gather"] | None = Field(default=None, description="what completes the result")
    keep: Literal["first"] | None = Field(default=None, description="rank 0 alone holds it: a bias of a reduced sum")
    segments: list[DimText] | None = Field(
        default=None,
        min_length=1,
        description="sizes along the dim that are divided each for itself, such as q, k and v of one packed tensor",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.shard is None) == (self.keep is None):
            raise ValueError("`tp` takes `shard: DIM` or `keep: first`, one of the two")
        if self.segments is not None and (self.shard is None or self.kind != "rows"):
            raise ValueError("`segments` go with `shard: DIM`")
        return self


class TiedSpec(Strict):
    """The weight is another one under a condition, and then needs no tensor of its own."""

    to: str
    when: str | None = None


class WeightSpec(Strict):
    """One weight; a name of the checkpoint that holds `{i}` makes it one per layer."""

    shape: list[DimText] = Field(max_length=4)
    hf: Source
    tp: ShardSpec | None = None
    tied: TiedSpec | None = None
    when: str | None = Field(default=None, description="a condition on the config: without it the weight is absent")


class BranchSpec(Strict):
    """One way of a `choose`; without `when` it is taken where no other was, and stands last."""

    when: str | None = Field(default=None, description="a condition on the config and, in a layer, on its index")
    do: list["Line"] = Field(min_length=1)


class ChooseSpec(Strict):
    """Statements that depend on the config or on the layer: the first branch whose condition holds."""

    choose: list[BranchSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _otherwise_last(self) -> Self:
        if any(branch.when is None for branch in self.choose[:-1]):
            raise ValueError("only the last branch of a `choose` may have no `when`")
        if self.choose[0].when is None:
            raise ValueError("the first branch of a `choose` needs a `when`")
        return self


Line = Annotated[Text | Annotated[ChooseSpec, Tag("mapping")], Discriminator(shape_of)]
BranchSpec.model_rebuild()


class PatchSpec(Strict):
    """An edit of inherited statements, anchored on a text that must begin exactly one of them.

    A `choose` begins with `when` and its first condition.
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
            raise ValueError("a patch takes one of `before: TEXT`, `after: TEXT`, `replace: TEXT`")
        if (self.replace is not None, self.replace is None) != (self.with_ is not None, self.add is not None):
            raise ValueError("`before` and `after` go with `add: [...]`, `replace` goes with `with: [...]`")
        return self


class BlockSpec(Strict):
    """A piece of a layer that is one node at block level; under `extends`, what is given joins or replaces."""

    summary: str | None = None
    op_type: OpTypes | None = None
    hf: str | None = Field(default=None, description="prefix of its checkpoint names")
    weights: dict[str, WeightSpec] = Field(default={})
    args: dict[str, str] | None = None
    body: list[Line] | None = Field(default=None, min_length=1)
    returns: list[str] | None = Field(default=None, min_length=1)
    patch: list[PatchSpec] = Field(default=[])


class RepeatSpec(Strict):
    """A loop over the layers. The carried names must close: same type after each turn as before it."""

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
    """Names of an inherited block that this layout does without."""

    weights: list[str] = Field(min_length=1)


class DropSection(Strict):
    """What of the inherited layout this one does without; each entry must be there."""

    config: list[str] = Field(default=[])
    checks: list[str] = Field(default=[], description="the text of the check; spaces do not count")
    weights: list[str] = Field(default=[])
    blocks: dict[str, DropBlock | None] = Field(default={}, description="`NAME: null` drops the whole block")


class TpSection(Strict):
    """Config sizes that become local, divided by the degree, under tensor parallelism."""

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
    extends: str | None = Field(default=None, description="a layout without `extends` that this one starts from")
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
        default=None, description="in a layout that generates: the program's value that embeddings are made of"
    )
    phases: dict[PhaseName, dict[Literal["attend"], str]] = Field(
        default={}, description="the attention op of each phase; a layout without `attend` has none of it"
    )
    ignore_hf: list[str] = Field(default=[])
    tests: ModelTests
