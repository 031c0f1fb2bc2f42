"""The engine's state of a request besides the scheduler's: sampling, text and log-probabilities of each answer."""

import time
from collections.abc import Sequence as PySequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from sageLLM.runtime.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from sageLLM.runtime.sampling.logprobs import Logprob, ScoredTokens
from sageLLM.runtime.sampling.sampler import choose_seed
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.base import Chunk, Request
from sageLLM.runtime.text.detokenizer import Decoder
from sageLLM.runtime.text.stop import SequenceText, StopRules
from sageLLM.runtime.worker.faults import log_end, reraise_unless_attributable
from sageLLM.runtime.worker.orders import NewSequence

NUM_LAST_TOKENS = 3
"""Tokens to the left of a token that can hold the first bytes of its character."""


@dataclass(frozen=True, slots=True)
class RequestTraits:
    """Properties of a request for the scheduler's policy and the prefix cache.

    A lower `priority` is served first. `deadline` is in seconds after the arrival. Only requests of equal `cache_salt`
    share cached KV.
    """

    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    cache_salt: str = ""


class TokenText(Protocol):
    """Returns the text of a token that follows the tokens `before`."""

    def __call__(self, token_id: int, before: PySequence[int]) -> str: ...


@dataclass(slots=True)
class Sequence:
    """One of the `n` answers to a request: the scheduler's request with its seed and its text."""

    index: int
    group: "RequestGroup" = field(repr=False)
    request: Request
    seed: int
    banned_token_ids: list[int]
    eos_token_ids: list[int]  # those that can end an answer with a grammar
    text: SequenceText
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return self.text.finish_reason is not None

    @property
    def last_token_ids(self) -> list[int]:
        """The tokens to the left of the next one, as far as its text depends on them."""
        ids = self.request.output_token_ids[-NUM_LAST_TOKENS:]
        missing = NUM_LAST_TOKENS - len(ids)
        return [*self.request.prompt_token_ids[-missing:], *ids] if missing else ids

    def as_order(self) -> NewSequence:
        """The message that makes the sequence known to a worker, with all tokens so far."""
        request = self.request
        return NewSequence(
            request.request_id,
            request.prompt_token_ids,
            list(request.output_token_ids),
            self.group.params,
            self.seed,
            self.index,
            self.banned_token_ids,
            self.eos_token_ids,
        )

    def abort(self, reason: str) -> None:
        """Ends the answer with the tokens and the text so far."""
        try:
            self.text.abort(reason)
        except BaseException as error:
            reraise_unless_attributable(error)
            self.text.abort(reason)  # without the tokens that cannot be decoded

    def end_early(self, reason: str) -> None:
        """Ends the answer as `abort` does, and logs the reason."""
        log_end(self.group.request_id, reason)
        self.abort(reason)

    def append(self, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Appends the step's new token to the request and the text; `is_finished` may be true afterwards."""
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.text.append(token_id)

    def output(self) -> CompletionOutput:
        has_logprobs = self.group.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text.text,
            token_ids=tuple(self.request.output_token_ids),
            cumulative_logprob=self._cumulative_logprob() if has_logprobs else None,
            logprobs=tuple(self.logprobs) if has_logprobs else None,
            finish_reason=self.text.finish_reason,
            stop_reason=self.text.stop_reason,
        )

    def _cumulative_logprob(self) -> float:
        chosen = zip(self.request.output_token_ids, self.logprobs, strict=True)
        return sum(entries[token_id].logprob for token_id, entries in chosen)


@dataclass(slots=True)
class RequestGroup:
    """A user's request: one prompt, `n` sequences, one output."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    scored: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    is_streamed: bool = True  # whether the caller takes outputs before the end
    num_cached_tokens: int = 0

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    def rows_to_score(self, chunk: Chunk) -> list[int]:
        """The prompt positions of the chunk with logits that `prompt_logprobs` still requires.

        Only the first sequence scores the prompt. A chunk that is computed again after a preemption is not scored
        again.
        """
        if self.params.prompt_logprobs is None or chunk.request is not self.sequences[0].request:
            return []
        # The last prompt position predicts the first new token, which is not a prompt token.
        end = min(chunk.start + chunk.num_tokens, len(self.prompt_token_ids) - 1)
        return [position for position in range(chunk.start, end) if position + 1 not in self.scored]

    def score_prompt(self, positions: list[int], scored: ScoredTokens, token_text: TokenText) -> None:
        """Records the log-probabilities of the prompt tokens after `positions`."""
        ids, num_top = self.prompt_token_ids, self.params.prompt_logprobs or 0
        for row, position in enumerate(positions):
            left = ids[max(0, position + 1 - NUM_LAST_TOKENS) : position + 1]
            self.scored[position + 1] = scored.as_dict(row, num_top, partial(token_text, before=left))

    def output(self) -> RequestOutput:
        self.metrics.num_generated_tokens = sum(len(one.request.output_token_ids) for one in self.sequences)
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


def make_group(
    group_id: str,
    prompt: str | None,
    token_ids: list[int],
    params: SamplingParams,
    rules: StopRules,
    decoder: Decoder | None,
    salt: str = "",
    traits: RequestTraits | None = None,
) -> RequestGroup:
    """The group of a checked request with its `n` sequences; all but the first are forks of the first.

    Only requests of equal `salt` share cached KV.
    """
    group = RequestGroup(group_id, prompt, tuple(token_ids), params, RequestMetrics(arrival_time=time.monotonic()))
    first: Request | None = None
    seed = choose_seed(params)
    eos_ids = sorted(rules.eos_ids) if params.structured_outputs is not None else []
    traits = traits or RequestTraits()
    if traits.cache_salt:
        salt = f"{salt}\0{traits.cache_salt}"
    for index in range(params.n):
        scores_prompt = index == 0 and params.prompt_logprobs is not None
        text = SequenceText(decoder, rules, params.skip_special_tokens, token_ids)
        request = Request(
            request_id=f"{group_id}/{index}",
            prompt_token_ids=token_ids,
            output_token_ids=text.token_ids,  # one list, as a token is appended in each step
            max_new_tokens=rules.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,  # the scheduler's request has -1 for off
            arrival_time=group.metrics.arrival_time,
            # Scoring needs the logits of every prompt position. A unique salt prevents prefix cache hits, which would
            # skip them.
            salt=f"prompt_logprobs {group_id}" if scores_prompt else salt,
            fork_of=first,
            priority=traits.priority,
            tenant=traits.tenant,
            deadline=None if traits.deadline is None else group.metrics.arrival_time + traits.deadline,
        )
        first = first or request
        banned = list(rules.banned_before_min_tokens)
        group.sequences.append(Sequence(index, group, request, seed, banned, eos_ids, text))
    return group
