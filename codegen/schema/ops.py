"""What an ops file may say: kinds of node with their operands, their meaning and how they are tested."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from sageLLM.codegen.schema.base import Strict

Phase = Literal["prefill", "decode", "hybrid"]
AttrType = Literal["f32", "i32", "bool", "str", "dim"]
ElementName = Literal["bool", "i8", "i32", "i64", "f16", "bf16", "f32", "f64"]
Scalar = bool | int | float | str


def _form(value: Any) -> str:
    return "mapping" if isinstance(value, dict) else "text"


class InputSpec(Strict):
    """The long form of an input: `{type: "E[N]", optional: true}`."""

    type: str = Field(description='element type and named dims: "E[T, H]", "f32[..., D/2]", "i32[B + 1]"')
    optional: bool = Field(default=False, description="may be absent; optional inputs come after the others")
    doc: str | None = None


class AttrSpec(Strict):
    """A value fixed when the graph is built, passed by keyword."""

    type: AttrType = Field(description="`dim` is a size that operand types may use")
    default: Scalar | None = Field(default=None, description="for numbers also an expression of dims: `D ** -0.5`")
    optional: bool = Field(default=False, description="may be absent (None); see `optional` in the compute language")
    min: int | float | None = None
    max: int | float | None = None
    choices: list[Scalar] | None = Field(default=None, min_length=1)
    doc: str | None = None


class CostSpec(Strict):
    """The work of an op whose meaning is a hand-written reference; for the others it is derived."""

    let: dict[str, str] = Field(default={}, description="sizes known only at run time, each with its meaning")
    flops: str
    bytes: str = Field(description="moved to and from memory; `sizeof(E)` is the size of an element")


class KernelSpec(Strict):
    """What is filled into the op's templates."""

    params: dict[str, int | float | bool] = Field(default={}, description="constants, by name")
    hooks: dict[str, str] = Field(default={}, description="expressions over the tile: `score_mod`, `mask_mod`")
    epilogue_of: str | None = Field(
        default=None,
        description="an input that the kernel can read block by block, so that it fuses with the GEMM that produces it",
    )
    triton: dict[str, int] | None = Field(
        default=None,
        description="constants of its template in templates/triton, which has the name of the reference, or `linear` "
        "for a compute that is one product; without this, a GPU runs the reference",
    )


class RuleSpec(Strict):
    """The pass that rewrites the ops of `fuses` into this op."""

    pass_: str = Field(alias="pass")
    benefit: int = Field(default=1, ge=1, le=1000, description="rules with more benefit are tried first")


class RanksSpec(Strict):
    """What tensor parallelism may do with an op whose meaning is a `reference`; for the others it is derived."""

    divides: list[str] = Field(default=[], description="dims of which each rank may have its share, results as well")
    sums: list[str] = Field(
        default=[], description="dims that are summed over: a share of them gives a part of the sum"
    )
    linear_in: list[list[str]] = Field(
        default=[], description="inputs (each list: inputs together) in which the results are linear: parts give parts"
    )


class TestsSpec(Strict):
    """Sizes to test with: one generated test per case. `R` gives the leading dims of `...`."""

    cases: list[dict[str, int | list[int]]] = Field(min_length=1)


InputForm = Annotated[Annotated[str, Tag("text")] | Annotated[InputSpec, Tag("mapping")], Discriminator(_form)]


class OpSpec(Strict):
    """One op. Its meaning has exactly one source: `compute`, `fuses` or `reference`."""

    summary: str = Field(min_length=1)
    doc: str | None = None
    op_type: str | None = Field(default=None, description="member of OpType; a `fuses` op takes its last op's")
    tags: list[str] = Field(default=[])
    phases: list[Phase] = Field(default=["prefill", "decode", "hybrid"], min_length=1)
    types: dict[str, list[ElementName]] = Field(
        default={}, description="element-type variables; `E` is f16, bf16, f32 or f64 unless given here"
    )
    dims: dict[str, str] = Field(default={}, description="sizes of this op alone, beside those of specs/dims.yaml")
    inputs: dict[str, InputForm]
    outputs: dict[str, str] = Field(min_length=1)
    attrs: dict[str, AttrSpec] = Field(default={})
    where: list[str] = Field(default=[], description="conditions on dims and attrs: `Nq % Nkv == 0`")
    views: dict[str, str] = Field(
        default={}, description='parts of operands by another name: "gu[T, 0:I]", "x[T, N, D] as [T, N*D]"'
    )
    compute: str | None = Field(default=None, description="the meaning as equations, one per line")
    fuses: list[str] | None = Field(default=None, min_length=1, description="the meaning as calls of other ops")
    reference: str | None = Field(default=None, description="the meaning as a torch function: templates/reference/NAME")
    ranks: RanksSpec | None = Field(default=None, description="what holds for a rank's share of an operand")
    inplace: dict[str, str] = Field(default={}, description="output -> input whose memory it takes over")
    cost: CostSpec | None = None
    kernel: KernelSpec | None = None
    rule: RuleSpec | None = None
    tests: TestsSpec | None = None


class OpsFile(Strict):
    """`specs/ops/*.yaml`."""

    schema_: Literal["ops/v1"] = Field(alias="schema")
    ops: dict[str, OpSpec]
