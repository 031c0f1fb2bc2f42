"""Schema of model files: the layout of one model family, complete or as changes to another one."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from sageLLM.codegen.schema.base import BrokenRule, Strict
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
Keys = Annotated[Text | Annotated[list[str], Field(min_length=1), Tag("list")], Discriminator(shape_of)]
OpTypes = Annotated[Text | Annotated[dict[PhaseName, str], Tag("mapping")], Discriminator(shape_of)]


def in_order(keys: Keys | None) -> tuple[str, ...]:
    """The keys of `hf: KEY` or `hf: [KEY, ...]` in the order in which they are tried."""
    return (keys,) if isinstance(keys, str) else tuple(keys or ())


class ArchitecturesSpec(Strict):
    """The checkpoints that this layout reads, selected by `architectures` in config.json."""

    architectures: list[str] = Field(min_length=1, description="values of `architectures` in config.json")
    prefix: str = Field(
        default="",
        description="prefix of tensor names that checkpoints of the bare model lack; by default the first component "
        "that the names of all blocks share with a weight outside the layers",
    )
    outer_prefix: str = Field(
        default="", description="for layouts of bare models: prefix of the tensor names in checkpoints with a head"
    )
    root: str | None = Field(
        default=None,
        description="section of config.json with the keys of the text model, such as `text_config`, in a model with "
        "images or sound; a key `/KEY` is outside it",
    )
    flat: bool = Field(
        default=False, description="whether configs without `root` have the keys of the text model at the top level"
    )
    model_types: list[str] = Field(
        default=[],
        description="values of `model_type` in `root`, if the architectures have text models of several kinds",
    )
    names: dict[str, Keys] = Field(
        default={},
        description="beginnings of the layout's tensor names, and those that checkpoints have instead: the first of a "
        "list that occurs",
    )

    @model_validator(mode="after")
    def _in_root(self) -> Self:
        if self.root is None and (self.flat or self.model_types):
            raise BrokenRule("`flat` and `model_types` require `root: KEY`", "add `root`, or remove them")
        return self


class ConfigField(Strict):
    """One name of the layout: read from config.json, or fixed by `value`."""

    hf: Keys | None = Field(
        default=None, description="key of config.json, dotted for nested keys, or a list of keys tried in order"
    )
    default: Value = Field(
        default=None,
        description="value if the key is absent: the default of the checkpoint's config class; a string is an "
        "expression of earlier names",
    )
    if_null: Value = Field(
        default=None, description="value if the key is present but null; as `default` if that is null or an expression"
    )
    texts: dict[str, int | float] = Field(
        default={}, description="for a number: texts that config.json may have in its place, and the number of each"
    )
    value: Value = Field(default=None, description="value fixed by the family: a constant, or a string as in `default`")
    type: ConfigTypeName | None = Field(
        default=None, description="inferred from the default, else int. `str[L]`: one per layer; `int[]`: any length"
    )
    doc: str | None = Field(default=None, description="one line for the docs")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if ("value" in self.model_fields_set) == (self.hf is not None):
            raise BrokenRule(
                "a config name must have either `hf: KEY` or `value: CONSTANT`", "add one of them, or remove one"
            )
        if self.hf is None and "default" in self.model_fields_set:
            raise BrokenRule("`default` requires `hf: KEY`", "write `value` for a constant")
        if "if_null" in self.model_fields_set and "default" not in self.model_fields_set:
            raise BrokenRule("`if_null` requires `default`", "add the value of an absent key")
        if "if_null" in self.model_fields_set and (isinstance(self.if_null, list) or "[" in (self.type or "")):
            raise BrokenRule("`if_null` must be a single value", "remove `if_null`")
        if self.texts and (self.hf is None or self.type not in (None, "int", "float")):
            raise BrokenRule("`texts` requires `hf: KEY` of a number", "add `hf`, or remove `texts`")
        return self


class BaseFrequency(Strict):
    """Keys of config.json for the rotary base frequency."""

    hf: Keys = Field(description="key, or a list of keys tried in order")
    default: float = Field(description="value if no key is present")


Base = Annotated[
    Annotated[float | str, Tag("text")] | Annotated[BaseFrequency, Tag("mapping")], Discriminator(shape_of)
]


class ScalingSpec(Strict):
    """Keys of config.json for the rotary scaling, and the scaling types that the layout allows."""

    hf: Keys = Field(description="key of the scaling section, or a list of keys tried in order")
    allow: list[str] = Field(min_length=1, description="scaling types that the layout accepts, such as yarn")
    default: dict[str, bool | int | float | str] | None = Field(
        default=None, description="the section if config.json has none"
    )
    original: int | None = Field(
        default=None, ge=1, description="`original_max_position_embeddings` if config.json has none at its top level"
    )


class RopeSection(Strict):
    """Rotary position embedding (Su et al. 2021): the tables `cos` and `sin`, [P, dim/2]."""

    base: Base = Field(description="base frequency (theta): keys of config.json, or an expression of config names")
    dim: DimText = Field(description="number of rotated components per head; the others are unchanged")
    layout: Literal["half", "interleaved"] = Field(
        default="half",
        description="pairs of components: j and j + dim/2 (op `rope`), or 2j and 2j + 1 (op `rope_interleaved`)",
    )
    scaling: ScalingSpec | None = Field(default=None, description="scaling for longer sequences")
    mrope: bool = Field(
        default=False,
        description="whether configs have `mrope_section`, parts of a head that rotate by other positions in images; "
        "the positions of text are equal, so the rotation is the plain one",
    )


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

    k: list[DimText] = Field(default=["Nkv", "D"], min_length=2, max_length=2, description="[heads, width] of a key")
    v: list[DimText] = Field(default=["Nkv", "D"], min_length=2, max_length=2, description="[heads, width] of a value")
    v_of: Literal["k"] | None = Field(
        default=None, description="the value is the leading part of the key and is not stored separately"
    )


class ShardSpec(Strict):
    """Sharding of a weight under tensor parallelism."""

    shard: int | None = Field(default=None, ge=0, description="the dim that is divided over the ranks")
    kind: Literal["rows", "vocab"] = Field(
        default="rows", description="`vocab`: a table of tokens, with sizes that stay global"
    )
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
            raise BrokenRule("`tp` must have either `shard: DIM` or `keep: first`", "add one of them, or remove one")
        if self.segments is not None and (self.shard is None or self.kind != "rows"):
            raise BrokenRule("`segments` requires `shard: DIM`", "add `shard`, or remove `segments`")
        return self


class TiedSpec(Strict):
    """A weight that equals another one, always or under a condition; the checkpoint may then omit its tensor."""

    to: str = Field(description="the weight that it equals")
    when: str | None = Field(default=None, description="condition on the config under which it is tied")


class WeightSpec(Strict):
    """One weight; it is per-layer if its checkpoint names contain `{i}`."""

    shape: list[DimText] = Field(max_length=4, description="sizes, as expressions of config names")
    hf: Source = Field(description="tensor name, or how the weight is built from several tensors")
    tp: ShardSpec | None = Field(default=None, description="sharding under tensor parallelism")
    tied: TiedSpec | None = Field(default=None, description="the weight equals another one")
    when: str | None = Field(default=None, description="condition on the config under which the weight exists")


class BranchSpec(Strict):
    """One branch of a `choose`; the last branch may omit `when` and is then the default."""

    when: str | None = Field(default=None, description="condition on the config and, in a layer, on its index")
    do: list["Line"] = Field(min_length=1, description="statements")


class ChooseSpec(Strict):
    """Statements that depend on the config or on the layer: the first branch with a true condition applies."""

    choose: list[BranchSpec] = Field(min_length=1, description="branches in order")

    @model_validator(mode="after")
    def _otherwise_last(self) -> Self:
        if any(branch.when is None for branch in self.choose[:-1]):
            raise BrokenRule(
                "only the last branch of a `choose` may omit `when`", "add `when`, or move the branch to the end"
            )
        if self.choose[0].when is None:
            raise BrokenRule("the first branch of a `choose` must have `when`", "add `when: CONDITION`")
        return self


Line = Annotated[Text | Annotated[ChooseSpec, Tag("mapping")], Discriminator(shape_of)]
BranchSpec.model_rebuild()


class PatchSpec(Strict):
    """An edit of inherited statements, anchored at the one statement that begins with a text.

    The text of a `choose` is `when` and its first condition.
    """

    before: str | None = Field(default=None, description="beginning of the statement to insert before")
    after: str | None = Field(default=None, description="beginning of the statement to insert after")
    replace: str | None = Field(default=None, description="beginning of the statement to replace")
    add: list[Line] | None = Field(default=None, description="statements to insert")
    with_: list[Line] | None = Field(default=None, alias="with", description="statements that replace it")

    @model_validator(mode="after")
    def _anchored(self) -> Self:
        anchors = [anchor for anchor in (self.before, self.after, self.replace) if anchor is not None]
        if len(anchors) != 1 or not anchors[0].strip():
            raise BrokenRule(
                "a patch must have one of `before: TEXT`, `after: TEXT` and `replace: TEXT`",
                "keep one of them, with the beginning of a statement",
            )
        if (self.replace is not None, self.replace is None) != (self.with_ is not None, self.add is not None):
            raise BrokenRule(
                "`before` and `after` require `add: [...]`, `replace` requires `with: [...]`",
                "add the statements, or remove the other key",
            )
        return self


class BlockSpec(Strict):
    """A part of a layer that is one block-level node.

    With `extends` or `use`, weights are merged and the rest is replaced.
    """

    use: str | None = Field(
        default=None,
        description="block of another layout that this one starts from, as `LAYOUT.BLOCK`; config names that it reads "
        "and this layout lacks, their checks and test values come with it",
    )
    summary: str | None = Field(default=None, description="one sentence for the docs")
    op_type: OpTypes | None = Field(default=None, description="op type of the node, or one per phase")
    hf: str | None = Field(default=None, description="prefix of the checkpoint names")
    weights: dict[str, WeightSpec] = Field(default={}, description="one set of weights per layer")
    args: dict[str, str] | None = Field(default=None, description="name -> type, in order of the arguments")
    body: list[Line] | None = Field(default=None, min_length=1, description="statements `names = op(values, attr=...)`")
    returns: list[str] | None = Field(default=None, min_length=1, description="values with one row per token")
    patch: list[PatchSpec] = Field(default=[], description="edits of the body that is inherited or used")


class RepeatSpec(Strict):
    """The loop over the layers. A carried value must have the same type before and after each iteration."""

    repeat: str = Field(description="number of iterations: L, the layers")
    index: str = Field(description="name of the layer index")
    carry: list[str] = Field(min_length=1, description="values that one iteration passes to the next")
    do: list[Line] = Field(min_length=1, description="statements of one layer")


def _statement_kind(value: Any) -> str:
    if isinstance(value, dict):
        return "choose" if "choose" in value else "repeat"
    return "text"


Statement = Annotated[
    Text | Annotated[RepeatSpec, Tag("repeat")] | Annotated[ChooseSpec, Tag("choose")], Discriminator(_statement_kind)
]


class DropBlock(Strict):
    """Weights of an inherited or used block that this layout removes."""

    weights: list[str] = Field(min_length=1, description="names of weights")


class DropSection(Strict):
    """Inherited entries, and entries of used blocks, that this layout removes; each one must exist."""

    config: list[str] = Field(default=[], description="config names")
    checks: list[str] = Field(default=[], description="texts of checks; whitespace is ignored")
    weights: list[str] = Field(default=[], description="weights outside blocks")
    blocks: dict[str, DropBlock | None] = Field(default={}, description="`NAME: null` drops the whole block")


class TpSection(Strict):
    """Config sizes that are divided by the tensor parallel degree."""

    divides: list[str] = Field(default=[], description="sizes such as the numbers of heads")


Tiny = Annotated[
    Annotated[Scalar, Tag("text")] | Annotated[list[Scalar], Tag("list")] | Annotated[dict[str, Any], Tag("mapping")],
    Discriminator(shape_of),
]


class ModelTests(Strict):
    """`tiny`: an HF config small enough to build, run and snapshot in tests."""

    tiny: dict[str, Tiny] = Field(description="keys of config.json")


class ModelFile(Strict):
    """`specs/models/NAME.yaml`: one layout."""

    schema_: Literal["models/v1"] = Field(alias="schema", description="kind and version of the file")
    model: str = Field(description="name of the layout")
    summary: str = Field(description="one sentence, with the publication")
    extends: str | None = Field(default=None, description="the base layout")
    drop: DropSection | None = Field(default=None, description="inherited entries to remove")
    hf: ArchitecturesSpec = Field(description="the checkpoints that the layout reads")
    config: dict[str, ConfigField] = Field(default={}, description="config names, in order of definition")
    checks: list[str] = Field(default=[], description="conditions that config.json must satisfy: `Nq % Nkv == 0`")
    rope: RopeForm | None = Field(
        default=None, description="one pair of tables, `cos` and `sin`, or several by name: `cos_NAME`, `sin_NAME`"
    )
    alibi: AlibiSection | None = Field(default=None, description="ALiBi slopes")
    cache: CacheSection | None = Field(default=None, description="shape of cached keys and values")
    tp: TpSection | None = Field(default=None, description="sizes that tensor parallelism divides")
    weights: dict[str, WeightSpec] = Field(default={}, description="weights outside blocks")
    blocks: dict[str, BlockSpec] = Field(default={}, description="blocks by name, called like ops")
    program: list[Statement] | None = Field(
        default=None, description="statements of one step, from token ids to results"
    )
    patch: list[PatchSpec] = Field(default=[], description="edits of the inherited program")
    returns: list[str] | None = Field(default=None, description="results: logits and tokens, or rows of embeddings")
    hidden: str | None = Field(
        default=None,
        description="in a layout that generates text: the value that embeddings are computed from",
    )
    phases: dict[PhaseName, dict[Literal["attend"], str]] = Field(
        default={}, description="the attention op of each phase, for layouts with `attend`"
    )
    ignore_hf: list[str] = Field(
        default=[],
        description="checkpoint tensors that are not read; `*` at an end is a wildcard, `{L}` the value of config L, "
        "`{L..N}` each number from L to N - 1",
    )
    tests: ModelTests = Field(description="test config")
