"""/v1/messages: Anthropic's interface for one answer, as a list of content blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import msgspec

from sageLLM.runtime.server.admission import Ticket
from sageLLM.runtime.server.bodies import CountTokensBody, MessagesBody
from sageLLM.runtime.server.chat import prepare, tools_of
from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.generation import Generation, Piece
from sageLLM.runtime.server.message_bodies import as_chat
from sageLLM.runtime.server.output_parser import ParsedText
from sageLLM.runtime.server.prompts import check_model, render_chat, template_variables
from sageLLM.runtime.server.service import Service
from sageLLM.runtime.server.tools import ToolUse

Kind = Literal["text", "thinking", "tool_use"]
STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


async def create(service: Service, exchange: Exchange, body: MessagesBody, ticket: Ticket) -> None:
    chat = as_chat(body)
    use = tools_of(service, chat)
    prompt = await prepare(service, chat, ticket, use)
    # Clients ask for as many tokens as their largest model may answer; the context is the limit.
    room = service.ready.max_model_len - len(prompt.token_ids)
    prompt = replace(prompt, params=replace(prompt.params, max_tokens=min(body.max_tokens, room)))
    generation = service.generate(exchange, f"msg_{exchange.request_id}", chat, [prompt], ticket)
    try:
        await Messages(service, exchange, body, generation, use).run()
    finally:
        generation.close()


async def count_tokens(service: Service, exchange: Exchange, body: CountTokensBody) -> None:
    """The length of the prompt that the same body would have."""
    check_model(body.model, service.settings.model_names)
    fields = {name: getattr(body, name) for name in CountTokensBody.__struct_fields__}
    chat = as_chat(MessagesBody(max_tokens=1, **fields))
    _, ids = await render_chat(
        service.chat,
        chat.messages,
        template=service.chat_template,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        variables=template_variables(chat, service.template_kwargs),
        tools=tools_of(service, chat).definitions,
    )
    await exchange.respond_json({"input_tokens": len(ids)})


class Messages:
    """The response to one body. Each part of the answer continues the open block, or begins the next one."""

    def __init__(
        self, service: Service, exchange: Exchange, body: MessagesBody, generation: Generation, use: ToolUse
    ) -> None:
        self.service, self.exchange, self.body, self.generation = service, exchange, body, generation
        self.parser = service.make_parser(use, generation.prompts[0])
        self.blocks: list[dict[str, Any]] = []
        self._kind: Kind | None = None
        self._arguments: list[str] = []
        self._last: Piece | None = None

    async def run(self) -> None:
        is_open = False
        async for pieces in self.generation.steps():
            # Events begin with the first output, so that an early error is a response of its own.
            events = [] if is_open else [_event("message_start", message=self._message())]
            is_open = True
            events += [event for piece in pieces for event in self._events(piece)]
            if self.body.stream:
                if not self.exchange.is_streaming:
                    await self.exchange.start_stream()
                await self.exchange.write(b"".join(events))
        end = [*self._close(), *self._ending()]
        if not self.body.stream:
            await self.exchange.respond_json(self._message())
            return
        await self.exchange.write(b"".join(end))
        await self.exchange.end_stream()

    def _events(self, piece: Piece) -> Iterator[bytes]:
        self._last = piece
        parts = self.parser.feed(piece.text) if piece.text else []
        if piece.finish_reason is not None:
            parts = [*parts, *self.parser.finish()]
        for part in parts:
            yield from self._of_part(part)

    def _of_part(self, part: ParsedText) -> Iterator[bytes]:
        if part.reasoning:
            yield from self._extend("thinking", "thinking", part.reasoning)
        if part.content:
            yield from self._extend("text", "text", part.content)
        for call in part.tool_calls:
            function = call.get("function", {})
            if "id" in call:
                block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
                block["caller"] = {"type": "direct"}
                yield from self._begin("tool_use", block)
            if arguments := function.get("arguments"):
                self._arguments.append(arguments)
                yield self._delta(type="input_json_delta", partial_json=arguments)

    def _extend(self, kind: Kind, name: str, text: str) -> Iterator[bytes]:
        """Adds text to a block of the kind."""
        if self._kind != kind:
            extra = {"signature": ""} if kind == "thinking" else {"citations": None}
            yield from self._begin(kind, {"type": kind, name: "", **extra})
        self.blocks[-1][name] += text
        yield self._delta(type=f"{name}_delta", **{name: text})

    def _begin(self, kind: Kind, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        self._kind = kind
        self.blocks.append(block)
        yield _event("content_block_start", index=len(self.blocks) - 1, content_block=block)

    def _close(self) -> Iterator[bytes]:
        if self._kind is None:
            return
        if self._kind == "tool_use":
            self.blocks[-1]["input"] = _arguments("".join(self._arguments))
            self._arguments.clear()
        self._kind = None
        yield _event("content_block_stop", index=len(self.blocks) - 1)

    def _delta(self, **delta: Any) -> bytes:
        return _event("content_block_delta", index=len(self.blocks) - 1, delta=delta)

    def _ending(self) -> list[bytes]:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        return [_event("message_delta", delta=delta, usage=self._usage()), _event("message_stop")]

    def _stop_sequence(self) -> str | None:
        found = None if self._last is None else self._last.stop_reason
        return found if isinstance(found, str) else None

    def _stop_reason(self) -> str | None:
        if self._last is None or self._last.finish_reason is None:
            return None
        if self._last.finish_reason == "stop" and self.parser.has_called:
            return "tool_use"
        if self._last.finish_reason == "length" and self.generation.num_tokens < self.body.max_tokens:
            return "model_context_window_exceeded"
        return "stop_sequence" if self._stop_sequence() else STOP_REASONS[self._last.finish_reason]

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts cached tokens separately from the other tokens of the prompt."""
        num_cached = self.generation.num_cached_tokens
        return {
            "input_tokens": self.generation.num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": self.generation.num_tokens,
            "service_tier": "standard",
            **dict.fromkeys(("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use")),
        }

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.generation.request_id,
            "type": "message",
            "role": "assistant",
            "model": self.body.model or self.service.settings.model_names[0],
            "content": self.blocks,
            "stop_reason": self._stop_reason(),
            "stop_sequence": self._stop_sequence(),
            "stop_details": None,
            "container": None,
            "usage": self._usage(),
        }


def _event(kind: str, **values: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode({"type": kind, **values}) + b"\n\n"


def _arguments(text: str) -> dict[str, Any]:
    """The object of a call; {} for arguments that were cut, which streams show as they are."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
