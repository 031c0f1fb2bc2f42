"""Schema of hardware files: the limits of one device, for the cost model."""

from typing import Literal

from pydantic import Field

from sageLLM.codegen.schema.base import Strict


class LinkSpec(Strict):
    """A connection: to other devices (`link`), to host memory (`host_link`) or to files (`disk_link`)."""

    bandwidth: float = Field(gt=0, description="bytes per second in one direction")
    latency_us: float = Field(ge=0, description="microseconds until the first byte arrives")


class GemmSpec(Strict):
    """Block sizes of CPU GEMMs. The accumulators of a block must fit into the registers.

    A block has at least two panels: one of a projection, and one of its gate.
    """

    rows: int = Field(ge=1, le=14, description="rows of a block, with registers of 16 float32 lanes")
    panels: int = Field(ge=2, le=4, description="panels of 16 output features per block, with such registers")
    short_rows: int = Field(ge=1, le=14, description="rows of a block with shorter registers")
    short_panels: int = Field(ge=2, le=4, description="panels of a block with shorter registers")
    prepared_bytes: int = Field(
        ge=1024, description="bytes of input rows, packed for the kernel, that stay in the cache"
    )
    chunk_bytes: int = Field(ge=1024, description="bytes of a weight that stay in the cache while all rows use it")
    rows_per_part: int = Field(
        ge=1, description="rows from which work is divided by rows; with fewer rows, by output features"
    )
    prefetch_bytes: int = Field(ge=0, description="prefetch distance within a panel")
    streams: int = Field(ge=1, le=16, description="memory regions that a core reads in turn when it streams a weight")


class EfficiencySpec(Strict):
    """Fractions of the limits that a family of kernels reaches, and times that are independent of the limits."""

    compute: float = Field(default=1.0, gt=0, description="fraction of `peak_flops`")
    memory: float = Field(
        default=1.0, gt=0, description="fraction of `memory_bandwidth`; above 1 where operands stay in a cache"
    )
    overlap: float | None = Field(
        default=None,
        ge=1,
        description="exponent p of (arithmetic^p + memory^p)^(1/p): 1 adds the two times, null takes the longer",
    )
    launch_us: float | None = Field(
        default=None, ge=0, description="fixed time of a kernel, in place of `launch_overhead_us`"
    )
    sequence_us: float = Field(default=0.0, ge=0, description="attention: time per sequence with one query")
    context_ns: float = Field(default=0.0, ge=0, description="attention: time per token of the longest context")


class HardwareFile(Strict):
    """`specs/hardware/NAME.yaml`: one device type."""

    schema_: Literal["hardware/v1"] = Field(alias="schema", description="kind and version of the file")
    hardware: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="the name in commands")
    summary: str = Field(description="one sentence")
    source: str = Field(description="the source of the figures")
    peak_flops: dict[Literal["f32", "bf16", "f16", "f64", "i8"], float] = Field(description="operations per second")
    memory_bandwidth: float = Field(gt=0, description="bytes per second")
    memory_bytes: int = Field(gt=0, description="size of the memory")
    launch_overhead_us: float = Field(ge=0, description="fixed time per kernel launch")
    link: LinkSpec = Field(description="connection to other devices")
    host_link: LinkSpec = Field(description="connection to host memory")
    disk_link: LinkSpec | None = Field(default=None, description="connection to files (default: `host_link`)")
    gemm: GemmSpec | None = Field(default=None, description="block sizes of the CPU's GEMM kernels")
    efficiency: dict[str, EfficiencySpec] = Field(
        default={}, description="by op name, tag (gemm, experts), op type (prefill_attn), mixed_attn, or default"
    )
