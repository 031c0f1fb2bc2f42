"""Arguments of `sagellm simulate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.sim.metrics import Slo

DEFAULT_MODEL = "config.json"


@dataclass(frozen=True, slots=True)
class SimulateRequest:
    """The arguments of `sagellm simulate`; empty `modes` means all.

    Without a `trace` one is generated: `num_requests` requests with prompt and answer lengths of these medians and
    90th percentiles.
    """

    trace: Path | None
    skips_bad_rows: bool
    compares: bool
    modes: Sequence[str]
    model: str
    hardware: str | None
    profile: Path | None
    tensor_parallel_size: int
    prefill_tp: int | None
    decode_tp: int | None
    pipeline_depth: int
    expert_parallel_size: int
    rate: float | None
    num_requests: int | None
    prompt: tuple[float, float]
    output: tuple[float, float]
    seed: int
    slo: Slo
    num_prefill: int
    num_decode: int
    chunk_sizes: Sequence[int]
    max_prefill_tokens: int
    max_batch_size: int
    max_consecutive_decodes: int
    max_decode_context: int | None
    max_model_len: int | None
    long_prefill_threshold: int
    full_sequence_gate: bool
    prefix_caching: bool
    is_fused: bool
    step_overhead_us: float
    request_overhead_us: float
    block_size: int
    num_blocks: int | None
    as_json: bool

    @property
    def objective(self) -> ServiceObjective:
        return ServiceObjective(self.slo.ttft_s, self.slo.tpot_s)
