"""What the engine remembers of a request beside its place in the scheduler: sampling, text, log-probabilities."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sageLLM.runtime.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from sageLLM.runtime.engine.sampler import SequenceSampling, prompt_logprobs
from sageLLM.runtime.engine.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.base import Chunk, Request
from sageLLM.runtime.text.stop import SequenceText

TokenText = Callable[[int], str]


@dataclass(slots=True)
class Sequence:
    """One of a request's `n` answers: the scheduler's request, and how its tokens are chosen and shown."""

    index: int
    group: "RequestGroup" = field(repr=False)
    request: Request
    sampling: SequenceSampling
    text: SequenceText
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return self.text.finish_reason is not None

    def append(self, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Takes the step's new token; `is_finished` may be true afterwards."""
        self.request.output_token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.text.append(token_id)

    def output(self) -> CompletionOutput:
        wants = self.sampling.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text.text,
            token_ids=tuple(self.request.output_token_ids),
            cumulative_logprob=self._cumulative_logprob() if wants else None,
            logprobs=tuple(self.logprobs) if wants else None,
            finish_reason=self.text.finish_reason,
            stop_reason=self.text.stop_reason,
        )

    def _cumulative_logprob(self) -> float:
        chosen = zip(self.request.output_token_ids, self.logprobs, strict=True)
        return sum(entries[token_id].logprob for token_id, entries in chosen)


@dataclass(slots=True)
class RequestGroup:
    """A request as the user made it: one prompt, `n` sequences, one output."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    scored: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    num_cached_tokens: int = 0

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    def rows_to_score(self, chunk: Chunk) -> list[int]:
        """The prompt positions in the chunk whose logits are still wanted for `prompt_logprobs`.

        Only the first sequence scores, and a chunk that is computed again after a preemption is not scored again.
        """
        if self.params.prompt_logprobs is None or chunk.request is not self.sequences[0].request:
            return []
        end = min(chunk.start + chunk.num_tokens, len(self.prompt_token_ids) - 1)
        return [position for position in range(chunk.start, end) if position + 1 not in self.scored]

    def score_prompt(self, positions: list[int], logits_RV: Tensor, token_text: TokenText) -> None:
        """Notes what the model expected after each prompt position, given its rows of logits."""
        following = [self.prompt_token_ids[position + 1] for position in positions]
        entries = prompt_logprobs(logits_RV, following, self.params.prompt_logprobs or 0, token_text)
        self.scored |= {position + 1: entry for position, entry in zip(positions, entries, strict=True)}

    def output(self) -> RequestOutput:
        scored = None
        if self.params.prompt_logprobs is not None:
            scored = (None, *(self.scored[position] for position in sorted(self.scored)))
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=scored,
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.is_finished,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
        )
