"""Schema of the targets file: limits of the GPUs that kernels are compiled for, and the configurations of kernels."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sageLLM.codegen.schema.base import Strict

Constant = Annotated[int, Field(ge=1, le=2**16)]


class ConfigurationSpec(Strict):
    """The constants of a template for sizes up to some bounds, or the reason why the reference runs instead."""

    up_to: dict[str, Constant] = Field(
        default={},
        description="size -> the greatest value; E is bytes per element, G the heads of a group, ODD its odd factor, "
        "FORM 1 for elements and 2 for codes in the KV cache",
    )
    use: dict[str, Constant] | None = Field(default=None, description="constant of the template -> value")
    reference: str | None = Field(default=None, description="the reason why the reference runs at these sizes")

    @model_validator(mode="after")
    def _has_one_of_both(self) -> "ConfigurationSpec":
        if (self.use is None) == (self.reference is None):
            raise ValueError("expected either `use` or `reference`")
        for name, value in (self.use or {}).items():
            if name.startswith("BLOCK") and value & (value - 1):
                raise ValueError(f"{name} must be a power of 2, got {value}")
        return self


class TargetSpec(Strict):
    """One target of Triton's compiler."""

    summary: str = Field(description="one sentence")
    covers: list[str] = Field(default=[], description="other targets with these limits, for which its rows are used")
    shared_memory: int = Field(gt=0, description="bytes of shared memory that a program may have")
    processors: int = Field(gt=0, description="multiprocessors of the smallest usual device, for persistent grids")
    last_program_merges: bool = Field(
        default=True,
        description="whether a barrier of a program waits for the stores of its threads, so that the last of several "
        "programs can read what the others stored",
    )
    kernels: dict[str, list[ConfigurationSpec]] = Field(
        description="template of templates/triton -> configurations; the first with bounds that hold is used"
    )


class TargetsFile(Strict):
    """`specs/targets.yaml`: the targets that Triton kernels are compiled for."""

    schema_: Literal["targets/v1"] = Field(alias="schema", description="kind and version of the file")
    targets: dict[str, TargetSpec] = Field(
        min_length=1, description="name of the target -> its limits and configurations"
    )
