"""Options of `sagellm simulate`, and those that it shares with `sagellm plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from sageLLM.runtime.cli.options import Option

if TYPE_CHECKING:
    from sageLLM.runtime.scheduler.forecast import ServiceObjective
    from sageLLM.runtime.sim.metrics import Slo

DEFAULT_MODEL = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """The requests of a simulation, and the objective for their service."""

    trace: Annotated[Path | None, Option("Azure csv, Mooncake jsonl, or JSON pairs of lengths.")] = None
    skips_bad_rows: Annotated[
        bool, Option("Skip invalid rows of the trace, and print their number.", "--skip-bad-rows")
    ] = False
    rate: Annotated[float | None, Option("Requests per second of a Poisson process (default: the trace's times).")] = (
        None
    )
    num_requests: Annotated[int | None, Option("Number of requests, from the first one.", min=1)] = None
    prompt: Annotated[tuple[float, float], Option("Without a trace: median and p90 of prompt lengths.")] = (1020, 2734)
    output: Annotated[tuple[float, float], Option("Without a trace: median and p90 of answer lengths.")] = (129, 424)
    seed: Annotated[int, Option("Seed of arrivals and lengths.")] = 0
    slo_ttft: Annotated[float, Option("Objective for the time to first token, in seconds.")] = 1.0
    slo_tpot: Annotated[float, Option("Objective for the time per output token after it, in seconds.")] = 0.1

    @property
    def slo(self) -> Slo:
        from sageLLM.runtime.sim.metrics import Slo

        return Slo(self.slo_ttft, self.slo_tpot)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateRequest(TraceOptions):
    """The options of `sagellm simulate`; empty `modes` means all."""

    compares: Annotated[bool, Option("Compare with the times that a serving timeline records.", "--compare")] = False
    deploy: Annotated[
        str | None, Option("A deployment of specs/deploy, or a .yaml file: its workers, limits and objective.")
    ] = None
    modes: Annotated[
        list[str],
        Option("strict, prefill_first, time_share, hybrid, vllm or auto; can be repeated (default: all).", "--mode"),
    ] = field(default_factory=list)
    model: Annotated[str, Option("A config.json, or the name of a model in --profile.")] = DEFAULT_MODEL
    hardware: Annotated[
        str | None, Option("A device of specs/hardware, or a .yaml file (default: h100; with --profile none).")
    ] = None
    profile: Annotated[Path | None, Option("Measured latencies to use instead of the roofline.")] = None
    tensor_parallel_size: Annotated[int, Option("Devices per worker (tensor parallelism).", "--tp", min=1)] = 1
    prefill_tp: Annotated[int | None, Option("Devices per prefill worker of strict mode (default: --tp).", min=1)] = (
        None
    )
    decode_tp: Annotated[int | None, Option("Devices per decode worker of strict mode (default: --tp).", min=1)] = None
    pipeline_depth: Annotated[
        int, Option("Stages per worker, each of --tp devices (pipeline parallelism).", "--pp", min=1)
    ] = 1
    expert_parallel_size: Annotated[
        int, Option("Workers that share the experts of every layer and step together.", "--ep", min=1)
    ] = 1
    num_prefill: Annotated[int, Option("Prefill workers of strict mode.", "--prefill-workers", min=1)] = 1
    num_decode: Annotated[
        int,
        Option("Decode workers of strict mode; the other modes use the total.", "--decode-workers", min=0),
    ] = 1
    chunk_sizes: Annotated[
        list[int], Option("Prompt tokens per hybrid step; one row for each.", "--chunk-size", min=1)
    ] = field(default_factory=lambda: [512])
    max_prefill_tokens: Annotated[int, Option("Tokens per prefill step, and per step of vllm.", min=2)] = 4096
    max_batch_size: Annotated[int, Option("Requests per step.", min=1)] = 256
    max_consecutive_decodes: Annotated[int, Option("Decode steps of time_share before a waiting prefill.", min=0)] = 4
    max_decode_context: Annotated[
        int | None, Option("Sum of the context lengths in a decode step (default: unbounded).", min=1)
    ] = None
    max_model_len: Annotated[int | None, Option("Longest prompt and answer together (default: unbounded).", min=1)] = (
        None
    )
    long_prefill_threshold: Annotated[
        int, Option("vllm: prompt tokens of one request per step (0: no limit).", min=0)
    ] = 0
    full_sequence_gate: Annotated[
        bool, Option("vllm: admit a request only if KV blocks are free for all its tokens so far.")
    ] = True
    prefix_caching: Annotated[
        bool, Option("Reuse KV of equal prefixes, which include those of preempted requests.")
    ] = True
    async_scheduling: Annotated[
        bool, Option("Plan each step while the one before it runs; not in strict mode, or with --pp above 1.")
    ] = True
    is_fused: Annotated[
        bool,
        Option("Kernels of the engine, with epilogues; without it every op is a kernel.", "--fusion/--no-fusion"),
    ] = True
    step_overhead_us: Annotated[
        float, Option("Microseconds per step for which the device waits for the scheduler.", min=0)
    ] = 0.0
    request_overhead_us: Annotated[float, Option("The same for each request of the step.", min=0)] = 0.0
    block_size: Annotated[int, Option("Tokens per KV block.", min=1)] = 16
    num_blocks: Annotated[int | None, Option("KV blocks per worker (default: all that fit the device).", min=1)] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"], Option("The KV cache in 8 bits per element, or (auto) in 16 bits.")
    ] = "auto"
    as_json: Annotated[bool, Option("Print JSON instead of text.", "--json")] = False

    @property
    def objective(self) -> ServiceObjective:
        from sageLLM.runtime.scheduler.forecast import ServiceObjective

        return ServiceObjective(self.slo_ttft, self.slo_tpot)
