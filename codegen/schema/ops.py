"""Schema of ops files: ops with their operands, semantics, kernels and test cases."""

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
    doc: str | None = Field(default=None, description="one line for the docs")


class AttrSpec(Strict):
    """A value that is fixed when the graph is built, passed by keyword."""

    type: AttrType = Field(description="`dim` is a size that operand types may use")
    default: Scalar | None = Field(default=None, description="for numbers also an expression of dims: `D ** -0.5`")
    optional: bool = Field(default=False, description="may be absent (None); see `optional` in the compute language")
    min: int | float | None = Field(default=None, description="smallest allowed value")
    max: int | float | None = Field(default=None, description="largest allowed value")
    choices: list[Scalar] | None = Field(default=None, min_length=1, description="allowed values")
    doc: str | None = Field(default=None, description="one line for the docs")


class CostSpec(Strict):
    """The work of an op with a hand-written `reference`; for other ops it is derived."""

    let: dict[str, str] = Field(default={}, description="sizes that are only known at run time, with descriptions")
    flops: str = Field(description="floating-point operations, as a formula of dims and `let`")
    bytes: str = Field(
        description="bytes moved to and from memory; `sizeof(E)` is the size of an element, "
        "`kv_size` that of an element of the KV cache, `kv_scale` that of the scale of a row there"
    )


class KernelSpec(Strict):
    """Parameters and hooks for the op's templates."""

    params: dict[str, int | float | bool] = Field(default={}, description="constants by name")
    hooks: dict[str, str] = Field(default={}, description="expressions over a tile of scores: `score_mod`, `mask_mod`")
    epilogue_of: str | None = Field(
        default=None,
        description="an input that the kernel can read block by block, so that it fuses with the GEMM that produces it",
    )
    triton: dict[str, int] | None = Field(
        default=None,
        description="constants of the template in templates/triton, named like the reference, or `linear` for a "
        "`compute` that is one matrix product; without this field, a GPU runs the reference",
    )


class RuleSpec(Strict):
    """The pass that rewrites the ops of `fuses` into this op."""

    pass_: str = Field(alias="pass", description="the pass, which lists the op with `from_op`")
    benefit: int = Field(default=1, ge=1, le=1000, description="rules with a greater benefit are tried first")


class OpShardingSpec(Strict):
    """Behaviour under tensor parallelism of an op with a `reference`; for other ops it is derived."""

    divides: list[str] = Field(
        default=[], description="dims that may be divided over the ranks, in operands and results alike"
    )
    sums: list[str] = Field(
        default=[], description="dims that are summed over, so that a rank's shard of them leads to a partial sum"
    )
    linear_in: list[list[str]] = Field(
        default=[],
        description="groups of inputs in which the results are jointly linear, so that partial sums may pass through",
    )


class TestsSpec(Strict):
    """Sizes to test with, one generated test per case. `R` is the size, or list of sizes, of the leading dims `...`."""

    cases: list[dict[str, int | list[int]]] = Field(min_length=1, description="dim -> size")


InputForm = Annotated[Annotated[str, Tag("text")] | Annotated[InputSpec, Tag("mapping")], Discriminator(_form)]


class OpSpec(Strict):
    """One op. Its semantics are defined by exactly one of `compute`, `fuses` and `reference`."""

    summary: str = Field(min_length=1, description="one sentence, with the publication if there is one")
    doc: str | None = Field(default=None, description="details for the docs")
    op_type: str | None = Field(default=None, description="member of OpType; by default a `fuses` op has its last op's")
    tags: list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]] = Field(
        default=[], description="labels for passes, costs and kernels"
    )
    phases: list[Phase] = Field(
        default=["prefill", "decode", "hybrid"], min_length=1, description="phases that the op supports"
    )
    types: dict[str, list[ElementName]] = Field(
        default={}, description="element-type variables; by default `E` is f16, bf16, f32 or f64"
    )
    dims: dict[str, str] = Field(default={}, description="dims of this op only, in addition to specs/dims.yaml")
    inputs: dict[str, InputForm] = Field(description='name -> type, such as "E[T, H]"; in order of the arguments')
    outputs: dict[str, str] = Field(min_length=1, description="name -> type, in order of the results")
    attrs: dict[str, AttrSpec] = Field(default={}, description="values that are fixed when the graph is built")
    where: list[str] = Field(default=[], description="conditions on dims and attrs: `Nq % Nkv == 0`")
    views: dict[str, str] = Field(
        default={}, description='named slices and reshapes of operands: "gu[T, 0:I]", "x[T, N, D] as [T, N*D]"'
    )
    compute: str | None = Field(default=None, description="semantics as equations, one per line")
    fuses: list[str] | None = Field(default=None, min_length=1, description="semantics as calls of other ops")
    reference: str | None = Field(default=None, description="semantics as a torch function: templates/reference/NAME")
    tp: OpShardingSpec | None = Field(default=None, description="behaviour under tensor parallelism, for a `reference`")
    inplace: dict[str, str] = Field(default={}, description="output -> input that it overwrites in memory")
    cost: CostSpec | None = Field(default=None, description="work of a `reference`; derived for other ops")
    kernel: KernelSpec | None = Field(default=None, description="parameters of the op's kernel templates")
    rule: RuleSpec | None = Field(default=None, description="the rewrite rule that is derived from `fuses`")
    tests: TestsSpec | None = Field(default=None, description="sizes of the generated tests")


class OpsFile(Strict):
    """`specs/ops/*.yaml`."""

    schema_: Literal["ops/v1"] = Field(alias="schema", description="kind and version of the file")
    ops: dict[str, OpSpec] = Field(
        min_length=1, description="ops by name, which is the name of the function in graphs and kernels"
    )
