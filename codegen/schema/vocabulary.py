"""Schema of the vocabulary files: dims, op types, and step inputs."""

from typing import Literal

from pydantic import Field

from sageLLM.codegen.schema.base import Strict


class DimsFile(Strict):
    """`specs/dims.yaml`: the named dims, each with a description."""

    schema_: Literal["dims/v1"] = Field(alias="schema", description="kind and version of the file")
    dims: dict[str, str] = Field(min_length=1, description="dim -> description")


class OpTypesFile(Strict):
    """`specs/op_types.yaml`: the members of `OpType` in order, each with a description."""

    schema_: Literal["op_types/v1"] = Field(alias="schema", description="kind and version of the file")
    op_types: dict[str, str] = Field(min_length=1, description="member -> description")


class InputsFile(Strict):
    """`specs/inputs.yaml`: values that a layout may use without defining them."""

    schema_: Literal["inputs/v1"] = Field(alias="schema", description="kind and version of the file")
    step: dict[str, str] = Field(min_length=1, description="inputs that the engine provides in every step")
