"""/v1/responses: OpenAI's newer interface for one answer, without stored state.

Nothing is kept between requests, so `previous_response_id` and `background` are refused, and `store` has no effect.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from sageLLM.runtime.server.admission import CHARS_PER_TOKEN, Ticket
from sageLLM.runtime.server.bodies import ChatBody, ResponsesBody
from sageLLM.runtime.server.chat import num_chars
from sageLLM.runtime.server.errors import ApiError
from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.generation import Generation, Piece
from sageLLM.runtime.server.prompts import (
    EnginePrompt,
    chat_params,
    check_common,
    check_length,
    render_chat,
    template_variables,
)
from sageLLM.runtime.server.service import Service
from sageLLM.runtime.server.tools import ToolUse

TEXT_PARTS = ("input_text", "output_text", "text")


async def respond(service: Service, exchange: Exchange, body: ResponsesBody, ticket: Ticket) -> None:
    chat = as_chat(body)
    check_common(chat, service.settings.model_names, service.ready.policy)
    params = chat_params(chat, service.defaults, service.settings.max_logprobs)
    service.admission.claim(ticket, 1, num_chars(chat.messages) // CHARS_PER_TOKEN)
    await service.check_grammar(params)
    text, ids = await render_chat(
        service.chat,
        chat.messages,
        template=service.chat_template,
        add_generation_prompt=True,
        continue_final_message=False,
        variables=template_variables(chat, service.template_kwargs),
    )
    check_length(len(ids), params.max_tokens, service.ready, "input")
    prompt = EnginePrompt(text, ids, params)
    generation = service.generate(exchange, f"resp_{exchange.request_id}", chat, [prompt], ticket)
    try:
        await Responses(service, exchange, body, generation).run()
    finally:
        generation.close()


def as_chat(body: ResponsesBody) -> ChatBody:
    """The conversation and the sampling parameters as a chat. Raises ApiError 400."""
    for name, value in (("previous_response_id", body.previous_response_id), ("conversation", body.conversation)):
        if value is not None:
            raise ApiError(400, f"{name} is not supported: the server keeps no responses; send the whole input", name)
    if body.background:
        raise ApiError(400, "background is not supported: the server keeps no responses", "background")
    if body.truncation not in (None, "disabled"):
        raise ApiError(400, "truncation must be 'disabled'", "truncation")
    form = text_format(body)
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise ApiError(400, "reasoning.effort must be a text", "reasoning")
    messages: list[Any] = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages += [message for i, item in enumerate(items) if (message := _message(item, f"input[{i}]")) is not None]
    return ChatBody(
        messages=messages,
        model=body.model,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=body.seed,
        stop=body.stop,
        ignore_eos=body.ignore_eos,
        stream=body.stream,
        reasoning_effort=effort,
        chat_template_kwargs=body.chat_template_kwargs,
        priority=body.priority,
        deadline=body.deadline,
        tenant=body.tenant,
        cache_salt=body.cache_salt,
        structured_outputs=body.structured_outputs,
        response_format=as_response_format(form),
    )


def text_format(body: ResponsesBody) -> dict[str, Any]:
    form = (body.text or {}).get("format") or {"type": "text"}
    if not isinstance(form, dict):
        raise ApiError(400, f"text.format must be an object, got a {type(form).__name__}", "text")
    return form


def as_response_format(form: dict[str, Any]) -> dict[str, Any]:
    """`text.format` in the form of chats: it has the fields of `json_schema` itself."""
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _message(item: object, place: str) -> dict[str, Any] | None:
    """A message; None for reasoning of earlier answers, which chat templates leave out."""
    if not isinstance(item, dict):
        raise ApiError(400, f"{place} must be an object", "input")
    kind = item.get("type", "message")
    if kind == "reasoning":
        return None
    if kind != "message" or not isinstance(item.get("role"), str):
        text = f"{place} must be a message with role and content; other items are not implemented"
        raise ApiError(400, text, "input")
    role = "system" if item["role"] == "developer" else item["role"]
    content = item.get("content")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise ApiError(400, f"{place}.content must be a text or a list of parts", "input")
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{place}.content[{number}] must be a part of type input_text with a text", "input")
        texts.append(part["text"])
    return {"role": role, "content": "\n".join(texts)}


class Responses:
    """The response to one body."""

    def __init__(self, service: Service, exchange: Exchange, body: ResponsesBody, generation: Generation) -> None:
        self.service, self.exchange, self.body, self.generation = service, exchange, body, generation
        self.created = int(time.time())
        self.item_id = f"msg_{exchange.request_id}"
        self.parser = service.make_parser(ToolUse(), generation.prompts[0].text)
        self.text = ""
        self.last: Piece | None = None
        self.number = 0

    async def run(self) -> None:
        if self.body.stream:
            await self._stream()
            return
        async for pieces in self.generation.steps():
            for piece in pieces:
                self._parse(piece)
        await self.exchange.respond_json(self._response())

    def _parse(self, piece: Piece) -> str:
        """Adds the piece; returns its content."""
        parts = self.parser.feed(piece.text) if piece.text else []
        if piece.finish_reason is not None:
            parts = [*parts, *self.parser.finish()]
        self.last = piece
        new = "".join(part.content for part in parts)
        self.text += new
        return new

    async def _stream(self) -> None:
        is_open = False
        async for pieces in self.generation.steps():
            # Events begin with the first output, so that an early error is a response of its own.
            events = [] if is_open else self._opening()
            is_open = True
            for piece in pieces:
                if new := self._parse(piece):
                    events.append(self._event("response.output_text.delta", **self._place(), delta=new, logprobs=[]))
            if not self.exchange.is_streaming:
                await self.exchange.start_stream()
            if events:
                await self.exchange.write(b"".join(events))
        await self.exchange.write(b"".join(self._closing()))
        await self.exchange.end_stream()

    def _opening(self) -> list[bytes]:
        response = self._response(status="in_progress")
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = self._item("in_progress") | {"content": []}
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place(), part=part),
        ]

    def _closing(self) -> list[bytes]:
        response = self._response()
        item = response["output"][0]
        return [
            self._event("response.output_text.done", **self._place(), text=self.text, logprobs=[]),
            self._event("response.content_part.done", **self._place(), part=item["content"][0]),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{response['status']}", response=response),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **values: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self.number, **values})
        self.number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _item(self, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"id": self.item_id, "type": "message", "status": status, "role": "assistant", "content": [part]}

    def _response(self, status: str | None = None) -> dict[str, Any]:
        is_cut = self.last is not None and self.last.finish_reason == "length"
        ended = "incomplete" if is_cut else "completed"
        params = self.generation.prompts[0].params
        usage = None
        if status is None:
            num_prompt, num_answer = self.generation.num_prompt_tokens, self.generation.num_tokens
            usage = {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": self.generation.num_cached_tokens},
                "output_tokens": num_answer,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": num_prompt + num_answer,
            }
        return {
            "id": self.generation.request_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status is None else None,
            "status": status or ended,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut and status is None else None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "max_tool_calls": None,
            "model": self.body.model or self.service.settings.model_names[0],
            "output": [] if status is not None else [self._item(ended)],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "prompt_cache_key": None,
            "reasoning": {"effort": (self.body.reasoning or {}).get("effort"), "summary": None},
            "safety_identifier": None,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": text_format(self.body)},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "truncation": "disabled",
            "usage": usage,
            "user": None,
            "metadata": self.body.metadata or {},
        }
