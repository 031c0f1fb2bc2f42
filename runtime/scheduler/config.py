"""Configuration of the PD scheduler."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from sageLLM.runtime.scheduler.policy import PolicyName
from sageLLM.runtime.scheduler.transfer import TransferConfig

ModeName = Literal["strict", "time_share", "hybrid", "auto"]
PreemptionMode = Literal["swap", "recompute"]

_COUNTS = (
    "max_prefill_batch_size",
    "max_prefill_tokens",
    "prefill_chunk_size",
    "max_decode_batch_size",
    "max_decode_tokens",
    "max_overtakes",
)


@dataclass(slots=True)
class PDSchedulerConfig:
    """Mode, budgets, policy and preemption of `PDScheduler`; validated on construction.

    - `strict`: prefill and decode run on different workers, both in the same step; KV migrates between two pools.
    - `time_share`: one worker; a step is either prefill or decode. Decodes are preferred, but after
      `max_consecutive_decodes` decode steps a waiting prefill gets a step; 0 prefers prefill.
    - `hybrid`: one worker; a step holds the decodes and chunks of prefill (Sarathi-Serve, arXiv 2403.02310).
    - `auto`: one worker; the scheduler's `mode_chooser` selects time_share or hybrid for each step.

    Budgets are in tokens per step: a prefill step computes up to `max_prefill_tokens`; a hybrid step up to
    `max_prefill_tokens` in total, of which at most `prefill_chunk_size` are prefill. The requests of the step share
    them, first come first served; a prompt that exceeds the rest continues in the next step. Each decode is one token.

    `max_decode_context_tokens` bounds the sum of the context lengths of a decode step, for kernels with a run time
    that grows with it. The requests are then served round robin; one that exceeds the bound alone is served alone.

    With `enable_preemption=False` a request is admitted only when its prompt and `max_new_tokens` fit, and all of that
    is reserved. `policy` orders the requests (see `policy.py`); under every policy a request is overtaken by at most
    `max_overtakes` later arrivals once it is the longest-waiting one. Older requests that run count too: when one is
    preempted, it is the longest-waiting one again.

    `preemption_mode="swap"` keeps the KV of a preempted decode in the tiers of `KVBudget`, and recomputes it only when
    they are full.

    With `enable_prefix_caching` a request does not compute its leading full blocks if another request of the same salt
    has computed them before and they were not evicted since.
    """

    prefill_device_ids: list[int] = field(default_factory=lambda: [0])
    decode_device_ids: list[int] = field(default_factory=lambda: [0])
    mode: ModeName = "time_share"
    max_prefill_batch_size: int = 32
    max_prefill_tokens: int = 4096
    prefill_chunk_size: int = 512
    max_decode_batch_size: int = 256
    max_decode_tokens: int = 8192
    enable_preemption: bool = True
    preemption_mode: PreemptionMode = "recompute"
    max_consecutive_decodes: int = 4
    policy: PolicyName = "priority"
    max_overtakes: int = 256
    tenant_weights: dict[str, float] = field(default_factory=dict)
    max_decode_context_tokens: int | None = None
    transfer: TransferConfig = field(default_factory=TransferConfig)
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, get_args(ModeName))
        _check_choice("preemption_mode", self.preemption_mode, get_args(PreemptionMode))
        _check_choice("policy", self.policy, get_args(PolicyName))
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_consecutive_decodes < 0:
            raise ValueError(f"max_consecutive_decodes must be at least 0, got {self.max_consecutive_decodes}")
        if self.max_decode_context_tokens is not None and self.max_decode_context_tokens < 1:
            raise ValueError(f"max_decode_context_tokens must be at least 1, got {self.max_decode_context_tokens}")
        if self.mode in ("hybrid", "auto") and self.max_prefill_tokens < 2:
            raise ValueError(
                f"max_prefill_tokens must be at least 2 in {self.mode} mode (one decode and one prefill token), "
                f"got {self.max_prefill_tokens}"
            )

    @property
    def max_decodes(self) -> int:
        """Decodes that one step can serve; each is one token."""
        return min(self.max_decode_batch_size, self.max_decode_tokens)

    @property
    def prefill_tokens_per_step(self) -> int:
        """Prompt tokens that one step computes at most."""
        is_mixed = self.mode in ("hybrid", "auto")
        return min(self.prefill_chunk_size, self.max_prefill_tokens) if is_mixed else self.max_prefill_tokens


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
