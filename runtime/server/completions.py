"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sageLLM.runtime.server.admission import CHARS_PER_TOKEN, Ticket
from sageLLM.runtime.server.bodies import CompletionBody
from sageLLM.runtime.server.exchange import DONE, Exchange
from sageLLM.runtime.server.generation import Generation, Piece, Score
from sageLLM.runtime.server.prompts import (
    EnginePrompt,
    check_common,
    check_length,
    completion_params,
    completion_prompts,
    estimated_tokens,
    tokenize,
)
from sageLLM.runtime.server.service import Service
from sageLLM.runtime.server.streams import PLACE, TextFrame, frame, steps_of

UNSCORED = 0
"""The rank of a prompt's first token, which nothing precedes."""


async def complete(service: Service, exchange: Exchange, body: CompletionBody, ticket: Ticket) -> None:
    prompts = await prepare(service, body, ticket)
    generation = service.generate(exchange, f"cmpl-{body.request_id or exchange.request_id}", body, prompts, ticket)
    try:
        await Completion(service, exchange, body, generation).run()
    finally:
        generation.close()


async def prepare(service: Service, body: CompletionBody, ticket: Ticket) -> list[EnginePrompt]:
    check_common(body, service.settings.model_names, service.ready.policy)
    sources = completion_prompts(body.prompt)
    params = completion_params(body, service.defaults, service.settings.max_logprobs)
    service.admission.claim(ticket, len(sources) * params.n, estimated_tokens(sources, CHARS_PER_TOKEN))
    await service.check_grammar(params, body)
    prompts = []
    for source in sources:
        ids = await tokenize(service.tokenizer, source, body.add_special_tokens, body.truncate_prompt_tokens)
        check_length(len(ids), body.max_tokens, service.ready, "prompt")
        prompts.append(EnginePrompt(source if isinstance(source, str) else None, ids, params))
    return prompts


@dataclass(slots=True)
class Whole:
    """One answer of a response that is not streamed."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scores: list[list[Score]] = field(default_factory=list)
    last: Piece | None = None


class Completion:
    """The response to one body."""

    def __init__(self, service: Service, exchange: Exchange, body: CompletionBody, generation: Generation) -> None:
        self.service, self.exchange, self.body, self.generation = service, exchange, body, generation
        self.head = {
            "id": generation.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or service.settings.model_names[0],
        }
        # An answer of no tokens, to score or echo the prompt: one token is computed and left out.
        self.is_dropped = body.max_tokens == 0 and body.echo
        self.offsets: dict[int, int] = {}

    async def run(self) -> None:
        await (self._stream() if self.body.stream else self._respond())

    # --- one response ---

    async def _respond(self) -> None:
        wholes = [Whole() for _ in self.generation.answers]
        async for pieces in self.generation.steps():
            for piece in pieces:
                whole = wholes[piece.index]
                whole.texts.append(piece.text)
                whole.token_ids += piece.token_ids
                whole.scores += piece.scores or []
                whole.last = piece
        choices = [self._choice(index, whole) for index, whole in enumerate(wholes)]
        usage = self.service.usage(self.generation)
        if self.is_dropped:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        await self.exchange.respond_json(
            self.head
            | {
                "choices": choices,
                "service_tier": "default",
                "system_fingerprint": self.service.fingerprint,
                "usage": usage,
                "kv_transfer_params": None,
            }
        )

    def _choice(self, index: int, whole: Whole) -> dict[str, Any]:
        assert whole.last is not None
        prompt = self.generation.answers[index].prompt
        scores, text, token_ids = whole.scores, "".join(whole.texts), whole.token_ids
        if self.is_dropped:
            scores, text, token_ids = [], "", []
        if self.body.echo:
            text = self._prompt_text(prompt) + text
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprobs(index, [*self._echoed_scores(index), *scores])
        returns_ids = bool(self.body.return_token_ids)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if self.is_dropped else whole.last.finish_reason,
            "stop_reason": None if self.is_dropped else whole.last.stop_reason,
            "token_ids": token_ids if returns_ids else None,
            "prompt_logprobs": self._prompt_logprobs(index),
            "prompt_token_ids": prompt.token_ids if returns_ids else None,
        }

    def _prompt_logprobs(self, index: int) -> list[Any] | None:
        if self.body.prompt_logprobs is None:
            return None
        return shown_prompt_logprobs(self.generation, index)

    # --- streams ---

    async def _stream(self) -> None:
        options = self.body.stream_options
        has_usage = self.service.settings.enable_force_include_usage or bool(options and options.include_usage)
        is_continuous = bool(options and options.continuous_usage_stats and has_usage)
        is_new = [True] * len(self.generation.answers)
        plain = [] if self._has_details or is_continuous else self._text_frames()
        seconds = self.service.settings.sse_keep_alive_interval
        framed = (lambda piece: plain[piece.index](piece.text)) if plain else None
        async for pieces in steps_of(self.generation, self.exchange, seconds, framed):
            chunks = []
            for piece in pieces:
                if plain and piece.finish_reason is None:
                    chunks.append(plain[piece.index](piece.text))
                    continue
                chunk = self._chunk(piece, is_first=is_new[piece.index])
                is_new[piece.index] = False
                if piece.finish_reason is not None and not has_usage:
                    chunk["system_fingerprint"] = self.service.fingerprint  # else it comes with the usage
                if is_continuous:
                    chunk["usage"] = self.generation.answers[piece.index].usage()
                chunks.append(frame(chunk))
            if not self.exchange.is_streaming:
                await self.exchange.start_stream()
            await self.exchange.write(b"".join(chunks))
        tail = b""
        if has_usage:
            end = self.head | {"choices": [], "usage": self.service.usage(self.generation)}
            end["system_fingerprint"] = self.service.fingerprint
            tail = frame(end)
        await self.exchange.write(tail + DONE)
        await self.exchange.end_stream()

    @property
    def _has_details(self) -> bool:
        """Whether a chunk before the end has more than a text."""
        return self.body.echo or self.body.logprobs is not None or bool(self.body.return_token_ids)

    def _text_frames(self) -> list[TextFrame]:
        """The frames of chunks before the end, for each answer."""
        pieces = (Piece(answer.index, PLACE, [], None, None, None) for answer in self.generation.answers)
        return [TextFrame(self._chunk(piece, is_first=False)) for piece in pieces]

    def _chunk(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        text = "" if self.is_dropped else piece.text
        scores = [] if self.is_dropped else piece.scores or []
        prompt = self.generation.answers[piece.index].prompt
        if is_first and self.body.echo:
            text = self._prompt_text(prompt) + text
            scores = [*self._echoed_scores(piece.index), *scores]
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": text,
            "logprobs": None if self.body.logprobs is None else self._logprobs(piece.index, scores),
            "finish_reason": "length" if self.is_dropped else piece.finish_reason,
            "stop_reason": None if self.is_dropped else piece.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = piece.token_ids
            if is_first:
                choice["prompt_token_ids"] = prompt.token_ids
        return self.head | {"choices": [choice]}

    # --- parts ---

    def _prompt_text(self, prompt: EnginePrompt) -> str:
        if prompt.text is not None:
            return prompt.text
        tokenizer = self.service.tokenizer
        return tokenizer.decode(prompt.token_ids) if tokenizer else ""

    def _echoed_scores(self, index: int) -> list[list[Score]]:
        """The scores of the prompt's tokens if it is echoed; the first token has none."""
        if not self.body.echo:
            return []
        answer = self.generation.answers[index]
        number = index // answer.prompt.params.n
        first = answer.prompt.token_ids[0]
        tokenizer = self.service.tokenizer
        text = tokenizer.token_text(first) if tokenizer else ""
        return [[Score(first, text, 0.0, UNSCORED)], *self.generation.prompt_scores.get(number, [])]

    def _logprobs(self, index: int, rows: Sequence[list[Score]]) -> dict[str, Any]:
        tokens, values, tops, offsets = [], [], [], []
        offset = self.offsets.get(index, 0)
        for row in rows:
            score = row[0]
            is_scored = score.rank != UNSCORED
            tokens.append(self._token(score))
            offsets.append(offset)
            offset += len(score.text)
            values.append(score.logprob if is_scored else None)
            tops.append(self._top(row) if is_scored else None)
        self.offsets[index] = offset
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def _top(self, row: list[Score]) -> dict[str, float]:
        # Of tokens with the same text, the likelier one counts.
        return {self._token(score): score.logprob for score in sorted(row, key=lambda one: one.logprob)}

    def _token(self, score: Score) -> str:
        return f"token_id:{score.token_id}" if self.body.return_tokens_as_token_ids else score.text


def shown_prompt_logprobs(generation: Generation, index: int) -> list[Any]:
    """vLLM's form: None for the first token, then a mapping from token id to its score."""
    number = index // generation.answers[index].prompt.params.n
    rows = generation.prompt_scores.get(number, [])
    return [
        None,
        *(
            {str(s.token_id): {"logprob": s.logprob, "rank": s.rank, "decoded_token": s.text} for s in row}
            for row in rows
        ),
    ]
