"""What a hardware file may say: the limits of one device, as the cost model reads them."""

from typing import Literal

from pydantic import Field

from sageLLM.codegen.schema.base import Strict


class LinkSpec(Strict):
    """A connection: to other devices (`link`) or to host memory (`host_link`)."""

    bandwidth: float = Field(gt=0, description="bytes per second in one direction")
    latency_us: float = Field(ge=0, description="microseconds until the first byte arrives")


class ProductsSpec(Strict):
    """How matrix products are cut into blocks on a CPU. A block's sums have to fit into the registers."""

    rows: int = Field(ge=1, le=14, description="rows of a block, in registers of 16 float32 lanes")
    panels: int = Field(ge=1, le=4, description="panels of 16 output features of a block, in such registers")
    narrow_rows: int = Field(ge=1, le=14, description="rows of a block where registers are narrower")
    narrow_panels: int = Field(ge=1, le=4, description="panels of a block where registers are narrower")
    prepared_bytes: int = Field(
        ge=1024, description="bytes of input rows, in the kernel's form, that stay in the cache"
    )
    chunk_bytes: int = Field(ge=1024, description="bytes of a weight that stay in the cache while the rows pass")
    rows_per_part: int = Field(
        ge=1, description="rows that are worth a part of the work of their own; fewer share the weight"
    )
    ahead_bytes: int = Field(ge=0, description="of a panel, between what a block reads and what it fetches")
    streams: int = Field(ge=1, le=16, description="pieces of memory that a core reads in turn when it fetches a weight")


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
    products: ProductsSpec | None = Field(default=None, description="block sizes of CPU kernels for matrix products")
    efficiency: dict[str, float] = Field(default={}, description="share of the limit reached, per op tag")
