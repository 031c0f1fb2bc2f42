"""One HTTP request in the engine: submits its prompts, and turns token deltas into text, scores and ends."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sageLLM.runtime.engine.requests import stop_rules
from sageLLM.runtime.errors import EngineError
from sageLLM.runtime.server.admission import Admission, Ticket
from sageLLM.runtime.server.engine_client import EngineClient, Inbox
from sageLLM.runtime.server.exchange import ChunkWriter
from sageLLM.runtime.server.messages import Delta, Ready, ScoredToken, Submit
from sageLLM.runtime.server.metrics import Metrics
from sageLLM.runtime.server.prompts import EnginePrompt
from sageLLM.runtime.server.tracing import RequestTimes
from sageLLM.runtime.text.stop import SequenceText
from sageLLM.runtime.text.tokenizer import Tokenizer

NUM_LAST_TOKENS = 3
"""Tokens to the left of a token that can hold the first bytes of its character."""
MIN_LOGPROB = -9999.0


class Score(NamedTuple):
    """A token with its log-probability."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class Traits:
    """Facts of a request for the scheduler."""

    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    cache_salt: str = ""


@dataclass(slots=True)
class Piece:
    """New text and tokens of one answer; `scores` has the sampled token first in each entry."""

    index: int
    text: str
    token_ids: list[int]
    scores: list[list[Score]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(slots=True)
class Answer:
    """One answer: its text so far, by the rules that the engine applies too, and stop strings."""

    index: int
    request_id: str
    prompt: EnginePrompt
    text: SequenceText
    num_tokens: int = 0
    last_time: float = 0.0
    last_ids: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return self.text.finish_reason is not None

    def usage(self) -> dict[str, int]:
        """The usage in chunks of `continuous_usage_stats`, which count one answer to one prompt, as in vLLM."""
        return usage_of(len(self.prompt.token_ids), self.num_tokens)


def usage_of(num_prompt: int, num_answer: int) -> dict[str, int]:
    """The usage object of OpenAI's API for so many tokens."""
    return {"prompt_tokens": num_prompt, "total_tokens": num_prompt + num_answer, "completion_tokens": num_answer}


class Generation:
    """The answers to the prompts of one HTTP request. Iterating yields the pieces of each step.

    Answer `i * n + k` is the k-th answer to prompt i. `close` aborts what has not ended.
    """

    def __init__(
        self,
        request_id: str,
        prompts: Sequence[EnginePrompt],
        traits: Traits,
        *,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        ready: Ready,
        eos_ids: frozenset[int],
        admission: Admission,
        ticket: Ticket,
        metrics: Metrics,
        arrival: float,
    ) -> None:
        self.request_id, self.prompts, self.inbox = request_id, prompts, Inbox()
        self.num_cached_tokens = 0
        self.prompt_scores: dict[int, list[list[Score]]] = {}
        self._client, self._tokenizer, self._metrics = client, tokenizer, metrics
        self._admission, self._ticket, self._arrival = admission, ticket, arrival
        self._first_time: float | None = None
        self._queue_seconds = 0.0
        self.on_close: Callable[[Generation], None] | None = None
        self.answers: list[Answer] = []
        self._of_request: dict[str, int] = {}  # the first answer of each engine request
        self._open: dict[str, int] = {}  # answers without an end
        for prompt in prompts:
            name = client.new_id()
            self._of_request[name] = len(self.answers)
            self._open[name] = prompt.params.n
            rules = stop_rules(prompt.params, eos_ids, len(prompt.token_ids), ready.max_seq_len)
            for _ in range(prompt.params.n):
                skips = prompt.params.skip_special_tokens
                text = SequenceText(tokenizer, rules, skips, prompt.token_ids, prompt.kept_ids)
                last = prompt.token_ids[-NUM_LAST_TOKENS:]
                self.answers.append(Answer(len(self.answers), name, prompt, text, last_ids=last))
        self._submit(traits)

    def _submit(self, traits: Traits) -> None:
        try:
            for name, prompt in zip(list(self._open), self.prompts, strict=True):
                # The engine has no tokenizer, so stop strings are found here.
                params = replace(prompt.params, stop=None) if prompt.params.stop else prompt.params
                command = Submit(
                    name,
                    prompt.token_ids,
                    params,
                    traits.priority,
                    traits.deadline,
                    traits.tenant,
                    traits.cache_salt,
                )
                self._client.submit(command, self.inbox)
        except BaseException:
            self.close()
            raise

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(answer.num_tokens for answer in self.answers)

    async def steps(self) -> AsyncIterator[list[Piece]]:
        """The pieces of one or more steps. Raises RequestError, and EngineError if the engine or the request fails."""
        while self._open:
            deltas = await self.inbox.take()
            now = time.monotonic()
            if self._first_time is None:
                self._note_first(now)
            pieces = [piece for delta in deltas if (piece := self._piece(delta, now)) is not None]
            if pieces:
                yield pieces

    def stream_to(self, writer: ChunkWriter, framed: Callable[[Piece], bytes]) -> None:
        """Has pieces of texts written as they arrive, if the reader of `steps` waits, so that it sleeps on.

        Those about which anything is to be decided, such as first and last ones, still go to the reader.
        """

        def take(deltas: list[Delta]) -> bool:
            num_tokens = sum([len(delta.token_ids) for delta in deltas])
            if not writer.is_ready or not all(self._is_plain(delta, num_tokens) for delta in deltas):
                return False
            now = time.monotonic()
            writer.write(b"".join([framed(self._plain_piece(delta, now)) for delta in deltas]))
            return True

        self.inbox.sink = take

    def _is_plain(self, delta: Delta, num_tokens: int) -> bool:
        """Whether it only has tokens, and no rule of the answer applies to its next `num_tokens`."""
        if delta.finish_reason is not None or delta.logprobs is not None or delta.num_cached_tokens is not None:
            return False
        text = self._answer(delta).text
        return text.num_unchecked >= num_tokens and text.end_ids.isdisjoint(delta.token_ids)

    def _plain_piece(self, delta: Delta, now: float) -> Piece:
        """The piece of a delta for which `_is_plain` holds; most tokens of a stream come here."""
        answer, new = self._answer(delta), delta.token_ids
        answer.text.token_ids += new
        self._measure(answer, len(new), now)
        return Piece(answer.index, answer.text.take_delta(), new, None, None, None)

    def _answer(self, delta: Delta) -> Answer:
        return self.answers[self._of_request[delta.request_id] + delta.index]

    def times(self) -> RequestTimes:
        """The course of the request, for its span."""
        return RequestTimes(
            self.request_id,
            self.prompts[0].params,
            self.num_prompt_tokens,
            self._arrival,
            self._queue_seconds,
            self._first_time,
            self.num_tokens,
            self.num_cached_tokens,
            [answer.text.finish_reason or "abort" for answer in self.answers],
        )

    def close(self) -> None:
        if self.on_close is not None:
            self.on_close(self)
        for name in list(self._open):
            self._client.close_request(name)
        for answer in self.answers:
            if answer.request_id in self._open and answer.text.finish_reason in (None, "abort"):
                self._metrics.count_end("abort")
        self._open.clear()
        self.inbox.sink = None  # it refers to this object
        self._admission.leave(self._ticket)

    def _note_first(self, now: float) -> None:
        self._first_time = now
        self._admission.start(self._ticket)
        self._metrics.time_to_first_token.observe(now - self._arrival)

    def _piece(self, delta: Delta, now: float) -> Piece | None:
        answer = self._answer(delta)
        if answer.is_finished:
            return None
        if delta.num_cached_tokens is not None:
            self._note_prompt(delta, answer)
        num_taken = self._append(answer, delta)
        text, new, scores = answer.text, delta.token_ids, None
        if num_taken < len(new):
            new = new[:num_taken]
        if delta.logprobs is not None:
            scores = self._scores(answer.last_ids, new, delta.logprobs[:num_taken])
            answer.last_ids = [*answer.last_ids, *new][-NUM_LAST_TOKENS:]
        self._measure(answer, num_taken, now)
        if text.finish_reason is not None:
            self._end(answer, delta, now)
        return Piece(answer.index, text.take_delta(), new, scores, text.finish_reason, text.stop_reason)

    def _append(self, answer: Answer, delta: Delta) -> int:
        """Adds tokens up to the end of the answer; returns their number."""
        text = answer.text
        for count, token_id in enumerate(delta.token_ids, start=1):
            if text.append(token_id) is not None:
                return count
        if delta.finish_reason is not None:
            text.abort(str(delta.stop_reason))
        return len(delta.token_ids)

    def _end(self, answer: Answer, delta: Delta, now: float) -> None:
        if answer.text.finish_reason == "abort":
            self._metrics.count_end("error")
            raise EngineError(str(answer.text.stop_reason))
        self._metrics.observe_end(
            answer.text.finish_reason or "",
            len(answer.prompt.token_ids),
            answer.num_tokens,
            answer.prompt.params.max_tokens,
            arrival=self._arrival,
            first=self._first_time or now,
            end=now,
            queue_seconds=self._queue_seconds,
            num_preemptions=delta.num_preemptions or 0,
        )
        self._open[answer.request_id] -= 1
        is_early = delta.finish_reason is None  # by a stop string, of which the engine knows nothing
        if not self._open[answer.request_id]:
            del self._open[answer.request_id]
            if is_early:
                self._client.close_request(answer.request_id)
            else:
                self._client.finish(answer.request_id)
        elif is_early:
            self._client.abort_answer(answer.request_id, delta.index)

    def _measure(self, answer: Answer, num_tokens: int, now: float) -> None:
        if num_tokens:
            if answer.num_tokens:
                self._metrics.inter_token_latency.observe((now - answer.last_time) / num_tokens)
            self._metrics.generation_tokens.inc(num_tokens)
            answer.num_tokens += num_tokens
            answer.last_time = now

    def _note_prompt(self, delta: Delta, answer: Answer) -> None:
        num_cached = delta.num_cached_tokens or 0
        self.num_cached_tokens += num_cached
        self._queue_seconds = delta.queue_seconds or 0.0
        self._metrics.count_prompt(len(answer.prompt.token_ids), num_cached, answer.prompt.params.n)
        if delta.prompt_logprobs is not None:
            ids = answer.prompt.token_ids
            number = answer.index // answer.prompt.params.n
            self.prompt_scores[number] = self._scores(ids[:1], ids[1:], delta.prompt_logprobs)

    def _scores(self, before: list[int], token_ids: list[int], logprobs: list[list[ScoredToken]]) -> list[list[Score]]:
        rows = []
        left = list(before)
        for token_id, entries in zip(token_ids, logprobs, strict=False):
            rows.append(
                [Score(one, self._token_text(one, left), max(value, MIN_LOGPROB), rank) for one, value, rank in entries]
            )
            left = [*left, token_id][-NUM_LAST_TOKENS:]
        return rows

    def _token_text(self, token_id: int, before: Sequence[int]) -> str:
        return self._tokenizer.token_text(token_id, before) if self._tokenizer else ""
