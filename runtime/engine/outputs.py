"""Outputs of the engine for a request, under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sageLLM.runtime.sampling.logprobs import Logprob
from sageLLM.runtime.text.stop import FinishReason

TokenLogprobs: TypeAlias = Mapping[int, Logprob]
"""The log-probabilities at one position by token id: of the token there, and of the likeliest ones."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the `n` answers to a prompt.

    `stop_reason` is the stop string or the stop token id that ended the answer, None for the model's own
    end-of-sequence token, and None if `finish_reason` is "length". For "abort" it is a sentence with the cause.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """The times of one request, in seconds of the engine's monotonic clock."""

    arrival_time: float
    first_token_time: float | None = None
    finish_time: float | None = None
    num_generated_tokens: int = 0

    def record_first_token(self, now: float) -> None:
        """Of an answer; that of the first answer counts."""
        if self.first_token_time is None:
            self.first_token_time = now

    def record_finish(self, now: float) -> None:
        self.finish_time = now

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds; None before the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, in seconds; None before the end or with one token only."""
        if self.first_token_time is None or self.finish_time is None or self.num_generated_tokens < 2:
            return None
        return (self.finish_time - self.first_token_time) / (self.num_generated_tokens - 1)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The output of a request so far; `prompt_logprobs[0]` is None, as nothing precedes the first token.

    `num_cached_tokens` counts the prompt tokens that the prefix cache held, so that they were not computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = field(default=None, compare=False)
    num_cached_tokens: int = field(default=0, compare=False)
