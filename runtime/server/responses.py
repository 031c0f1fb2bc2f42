"""/v1/responses: OpenAI's newer interface for one answer, without stored state.

Nothing is kept between requests, so `previous_response_id` and `background` are refused, and `store` has no effect.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec

from sageLLM.runtime.server.admission import Ticket
from sageLLM.runtime.server.bodies import ResponsesBody
from sageLLM.runtime.server.chat import prepare, tools_of
from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.generation import Generation, Piece
from sageLLM.runtime.server.response_bodies import as_chat, text_format
from sageLLM.runtime.server.response_items import OutputItems
from sageLLM.runtime.server.service import Service
from sageLLM.runtime.server.tools import ToolUse


async def respond(service: Service, exchange: Exchange, body: ResponsesBody, ticket: Ticket) -> None:
    chat = as_chat(body)
    use = tools_of(service, chat)
    prompt = await prepare(service, chat, ticket, use, "input")
    generation = service.generate(exchange, f"resp_{exchange.request_id}", chat, [prompt], ticket)
    try:
        await Responses(service, exchange, body, generation, use).run()
    finally:
        generation.close()


class Responses:
    """The response to one body."""

    def __init__(
        self, service: Service, exchange: Exchange, body: ResponsesBody, generation: Generation, use: ToolUse
    ) -> None:
        self.service, self.exchange, self.body, self.generation, self.use = service, exchange, body, generation, use
        self.created = int(time.time())
        self.parser = service.make_parser(use, generation.prompts[0])
        self.output = OutputItems(exchange.request_id, self._event)
        self.last: Piece | None = None
        self.num_reasoning_tokens = 0
        self.number = 0

    async def run(self) -> None:
        if self.body.stream:
            await self._stream()
            return
        async for pieces in self.generation.steps():
            for piece in pieces:
                for _ in self._parse(piece):
                    pass  # events are of streams only
        await self.exchange.respond_json(self._response())

    def _parse(self, piece: Piece) -> Iterator[bytes]:
        """Adds the piece; returns its events."""
        was_reasoning = self.parser.is_reasoning
        parts = self.parser.feed(piece.text) if piece.text else []
        if was_reasoning or self.parser.is_reasoning:
            self.num_reasoning_tokens += len(piece.token_ids)
        if piece.finish_reason is not None:
            parts = [*parts, *self.parser.finish()]
        self.last = piece
        for part in parts:
            yield from self.output.add(part)
        if piece.finish_reason is not None:
            yield from self.output.end(self._ended)

    async def _stream(self) -> None:
        is_open = False
        async for pieces in self.generation.steps():
            # Events begin with the first output, so that an early error is a response of its own.
            events = [] if is_open else self._opening()
            is_open = True
            events += [event for piece in pieces for event in self._parse(piece)]
            if not self.exchange.is_streaming:
                await self.exchange.start_stream()
            if events:
                await self.exchange.write(b"".join(events))
        response = self._response()
        await self.exchange.write(self._event(f"response.{response['status']}", response=response))
        await self.exchange.end_stream()

    def _opening(self) -> list[bytes]:
        response = self._response(status="in_progress")
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def _event(self, kind: str, **values: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self.number, **values})
        self.number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    @property
    def _is_cut(self) -> bool:
        return self.last is not None and self.last.finish_reason == "length"

    @property
    def _ended(self) -> str:
        return "incomplete" if self._is_cut else "completed"

    def _usage(self) -> dict[str, Any]:
        num_prompt, num_answer = self.generation.num_prompt_tokens, self.generation.num_tokens
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": self.generation.num_cached_tokens},
            "output_tokens": num_answer,
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
            "total_tokens": num_prompt + num_answer,
        }

    def _response(self, status: str | None = None) -> dict[str, Any]:
        params = self.generation.prompts[0].params
        is_ended = status is None
        return {
            "id": self.generation.request_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if is_ended else None,
            "status": status or self._ended,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._is_cut and is_ended else None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "max_tool_calls": None,
            "model": self.body.model or self.service.settings.model_names[0],
            "output": self.output.items if is_ended else [],
            "parallel_tool_calls": self.body.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": None,
            "reasoning": {"effort": (self.body.reasoning or {}).get("effort"), "summary": None},
            "safety_identifier": None,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": text_format(self.body)},
            "tool_choice": self.body.tool_choice or self.use.choice,
            "tools": [{"strict": None, **tool} for tool in self.body.tools or []],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "truncation": "disabled",
            "usage": self._usage() if is_ended else None,
            "user": None,
            "metadata": self.body.metadata or {},
        }
