"""What a hardware file may say: the limits of one device, as the cost model reads them."""

from typing import Literal

from pydantic import Field

from sageLLM.codegen.schema.base import Strict


class LinkSpec(Strict):
    """A connection: to other devices (`link`) or to host memory (`host_link`)."""

    bandwidth: float = Field(gt=0, description="bytes per second in one direction")
    latency_us: float = Field(ge=0, description="microseconds until the first byte arrives")


class HardwareFile(Strict):
    """`specs/hardware/NAME.yaml`: one device type."""

    schema_: Literal["hardware/v1"] = Field(alias="schema")
    hardware: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="the name, as commands take it")
    summary: str
    source: str = Field(description="where the figures come from")
    peak_flops: dict[Literal["f32", "bf16", "f16", "f64", "i8"], float] = Field(description="operations per second")
    memory_bandwidth: float = Field(gt=0, description="bytes per second")
    memory_bytes: int = Field(gt=0)
    launch_overhead_us: float = Field(ge=0, description="time that each kernel costs besides its work")
    link: LinkSpec
    host_link: LinkSpec
    efficiency: dict[str, float] = Field(default={}, description="share of the limit reached, per op tag")
