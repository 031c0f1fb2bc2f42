"""Schema of format files: a quantisation method, and the formats of weights that its settings select."""

from typing import Literal

from pydantic import Field

from sageLLM.codegen.schema.base import Strict

Setting = str | int | bool | None


class NestedSpec(Strict):
    """A tensor of floats that may be stored as bytes: table[byte] * scale + offset, with a scale for each block."""

    table: str = Field(description="the tensor with the 256 values, by its name in files")
    scales: str = Field(description="the tensor with the scales, by its name in files")
    block: str = Field(description="the elements that share a scale, in the order of the file: `state.KEY`")
    offset: str = Field(description="the number that is added: `state.KEY`")


class FormatSpec(Strict):
    """A stored form of weights: the tensors in place of a weight, and its value as an expression of them.

    Dims are the names of `weight`, and names of `sizes`. A dim such as `K/G` has ceil(K / G) elements.
    """

    summary: str = Field(description="one sentence, with the publication")
    when: dict[str, Setting | list[Setting]] = Field(
        default={},
        description="keys of the settings and their values; `a.b` is a key of a section, `a|b` the first present one, "
        "null an absent or empty one",
    )
    sizes: dict[str, str | int] = Field(
        default={},
        description="numbers by name: a constant, or the key that has it; null and -1 are the whole inner dim",
    )
    weight: str = Field(default="[N, K]", description="the dims of the weight; the last ones are divided over ranks")
    name: str = Field(default=".weight", description="the end of the weight's name, in place of that of the tensors")
    tensors: dict[str, str] = Field(
        default={}, description='the stored tensors by the last part of their names: "i32[K/8, N]"'
    )
    stored: dict[str, str] = Field(
        default={}, description="tensors with another last part of their names in files, such as `weight.absmax`"
    )
    state: list[str] = Field(
        default=[],
        description="the last part of the name of a tensor with JSON, or several of which one is stored; sizes may be "
        "`state.KEY` then, and tensors are stored flat: in the order of their elements, with any dims",
    )
    nested: dict[str, NestedSpec] = Field(
        default={}, description="of formats with a state, tensors of floats that may be stored as bytes"
    )
    separator: Literal[".", "_"] = Field(default=".", description="the character before the last part of their names")
    block: dict[str, str] = Field(
        default={}, description='in place of tensors, the fields of a block of B elements in order: "u8[B/2]"'
    )
    unused: list[str] = Field(default=[], description="further tensors that may be stored and do not change the value")
    tables: dict[str, list[int | float]] = Field(default={}, description="constants of `lut`, and orders of `bits`")
    let: dict[str, str] = Field(default={}, description="expressions by name, each of which may use those before it")
    value: str = Field(description="the weight as an expression of the tensors")
    write: dict[str, dict[str, Setting | list[int]]] = Field(
        default={},
        description="names of `sagellm quantize --format`, with those settings of `when` that have several values; "
        "`int4-g{G}` has the size G in its name",
    )
    shape: str | None = Field(default=None, description="an unused tensor that is written: i64[2], N and K")
    scales: Literal["range", "largest", "least_squares"] = Field(
        default="range",
        description="the scale of written codes: the range of the group over that of the codes, its largest magnitude "
        "over the largest code, or that of the least sum of squared errors, by search, for formats in blocks",
    )
    incomplete: str | None = Field(
        default=None, description="of a format in blocks, the format in place of it for rows of incomplete blocks"
    )


class ArchitectureSpec(Strict):
    """An architecture of GGUF files: its config and its tensors, as Hugging Face checkpoints have them."""

    hf: str = Field(default="", description="the class in `architectures` of config.json")
    model_type: str = Field(default="", description="`model_type` of config.json, by default the architecture's name")
    keys: dict[str, str | None] = Field(
        default={},
        description="keys of config.json, and those of the metadata after the name of the architecture, or a product "
        "`a * b / c` of them; null removes one of the defaults",
    )
    optional: list[str] = Field(default=[], description="those of `keys` that may be absent")
    copies: dict[str, str] = Field(
        default={}, description="keys of the metadata that are written with the value of another, unless they have one"
    )
    constants: dict[str, Setting | float] = Field(default={}, description="further keys of config.json")
    present: dict[str, str] = Field(default={}, description="keys that are true if the file has the tensor")
    names: dict[str, str | None] = Field(
        default={}, description="names of tensors, without the layer and the last part, and those in checkpoints"
    )
    experts: dict[str, str] = Field(default={}, description="names of stacks of experts, with {e} for the expert")
    rows: list[str] = Field(default=[], description="vectors that checkpoints have as matrices of one row")
    is_permuted: bool = Field(default=False, description="whether rows of q and k are in pairs of rotated components")
    adds_one: bool = Field(default=False, description="whether the weights of norms have 1 added")
    rope: Literal["rope_parameters", "rope_scaling"] = Field(
        default="rope_parameters",
        description="the section with the rotation; of `rope_scaling`, `rope_theta` is outside",
    )
    refused: dict[str, list[int]] = Field(
        default={}, description="values of metadata with which the file does not determine the model"
    )


class RecipeSpec(Strict):
    """A recipe of written GGUF files: a format of matrices, and others for some tensors in some layers."""

    summary: str = Field(description="one sentence")
    matrices: str = Field(description="the format of matrices")
    tensors: dict[str, dict[str, str]] = Field(
        default={},
        description="the formats of tensors by the start of their names and by layers: `all`, `first 4`, `first 1/8` "
        "of them, or `alternating`: the first and the last eighth and each third layer between; the first match counts",
    )
    file_type: int | None = Field(default=None, description="`general.file_type` in the metadata")


class FormatsFile(Strict):
    """`specs/formats/NAME.yaml`: one quantisation method."""

    schema_: Literal["formats/v1"] = Field(alias="schema", description="kind and version of the file")
    method: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="the name in messages and generated code")
    summary: str = Field(description="one sentence")
    quant_method: str | None = Field(default=None, description="`quant_method` in config.json; null for GGUF files")
    groups: str | None = Field(
        default=None, description="the key of sections that each apply to the modules in their `targets`"
    )
    skip: list[str] = Field(default=[], description="keys with a list of modules that are not quantised")
    keys: list[str] = Field(default=[], description="further keys, which do not change values")
    activations: str | None = Field(
        default=None, description="the key of a section that declares the type of activations, which values do not use"
    )
    architecture_defaults: ArchitectureSpec = Field(
        default=ArchitectureSpec(), description="keys, names and experts that all architectures have"
    )
    architectures: dict[str, ArchitectureSpec] = Field(
        default={}, description="of GGUF files, the architectures by `general.architecture`"
    )
    recipes: dict[str, RecipeSpec] = Field(
        default={}, description="of GGUF files, names of `sagellm convert --format` for files of several formats"
    )
    writes: dict[str, Setting] = Field(default={}, description="further settings of written checkpoints")
    formats: dict[str, FormatSpec] = Field(min_length=1, description="the formats; the first with the settings is used")
