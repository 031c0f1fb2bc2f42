"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sageLLM.runtime.server.admission import CHARS_PER_TOKEN, Ticket
from sageLLM.runtime.server.bodies import ChatBody
from sageLLM.runtime.server.completions import shown_prompt_logprobs
from sageLLM.runtime.server.exchange import DONE, Exchange
from sageLLM.runtime.server.generation import Generation, Piece, Score, usage_of
from sageLLM.runtime.server.output_parser import ParsedText
from sageLLM.runtime.server.prompts import (
    EnginePrompt,
    chat_params,
    check_common,
    check_length,
    render_chat,
    template_variables,
)
from sageLLM.runtime.server.service import Service
from sageLLM.runtime.server.streams import PLACE, TextFrame, frame, steps_of
from sageLLM.runtime.server.tools import ToolUse, tool_use, usable_tools


async def chat(service: Service, exchange: Exchange, body: ChatBody, ticket: Ticket) -> None:
    use = tools_of(service, body)
    prompt = await prepare(service, body, ticket, use)
    generation = service.generate(
        exchange, f"chatcmpl-{body.request_id or exchange.request_id}", body, [prompt], ticket
    )
    try:
        await Chat(service, exchange, body, generation, use).run()
    finally:
        generation.close()


def tools_of(service: Service, body: ChatBody) -> ToolUse:
    """The tools of a chat. Raises ApiError 400."""
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    return usable_tools(service.dialects.calls, use)


async def prepare(
    service: Service, body: ChatBody, ticket: Ticket, use: ToolUse, param: str = "messages"
) -> EnginePrompt:
    """The prompt of a chat; `param` is the field that a prompt that is too long comes from."""
    check_common(body, service.settings.model_names, service.ready.policy)
    params = chat_params(body, service.defaults, service.settings.max_logprobs)
    service.admission.claim(ticket, params.n, num_chars(body.messages) // CHARS_PER_TOKEN)
    if not use.is_forced:
        await service.check_grammar(params, body)
    text, ids = await render_chat(
        service.chat,
        body.messages,
        template=service.chat_template,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=template_variables(body, service.template_kwargs),
        tools=use.definitions,
    )
    if body.truncate_prompt_tokens is not None and body.truncate_prompt_tokens >= 0:
        ids = ids[-body.truncate_prompt_tokens :] if body.truncate_prompt_tokens else []
    check_length(len(ids), params.max_tokens, service.ready, param)
    constrained = service.constrain(params, use, text)  # depends on the prompt, which may have opened reasoning
    if constrained is not params:
        await service.check_grammar(constrained, body)
    return EnginePrompt(text, ids, constrained, service.kept_ids(use))


def num_chars(messages: list[Any]) -> int:
    """The characters of all contents, to estimate the tokens."""
    count = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            count += len(content)
        elif isinstance(content, list):
            parts = (part.get("text") for part in content if isinstance(part, dict))
            count += sum(len(text) for text in parts if isinstance(text, str))
    return count


@dataclass(slots=True)
class Whole:
    """One answer of a response that is not streamed."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scores: list[list[Score]] = field(default_factory=list)
    last: Piece | None = None


class Chat:
    """The response to one body."""

    def __init__(
        self, service: Service, exchange: Exchange, body: ChatBody, generation: Generation, use: ToolUse
    ) -> None:
        self.service, self.exchange, self.body, self.generation, self.use = service, exchange, body, generation, use
        self.parsers = [service.make_parser(use, answer.prompt) for answer in generation.answers]
        self.head = {
            "id": generation.request_id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model or service.settings.model_names[0],
        }
        self.num_reasoning_tokens = 0
        self.role = "assistant"
        self.echoed = ""
        if body.echo and body.messages:
            last = body.messages[-1].get("content")
            self.echoed = last if isinstance(last, str) else ""

    async def run(self) -> None:
        await (self._stream() if self.body.stream else self._respond())

    def _parse(self, piece: Piece) -> list[ParsedText]:
        parser = self.parsers[piece.index]
        was_reasoning = parser.is_reasoning
        parts = parser.feed(piece.text) if piece.text else []
        if was_reasoning or parser.is_reasoning:
            self.num_reasoning_tokens += len(piece.token_ids)
        if piece.finish_reason is not None:
            parts = [*parts, *parser.finish()]
        return parts if self.body.include_reasoning else [part for part in parts if not part.reasoning]

    def _finish_reason(self, piece: Piece) -> str | None:
        """As in vLLM, a call that is forced by name ends with "stop"."""
        if piece.finish_reason == "stop" and self.parsers[piece.index].has_called and self.use.choice != "named":
            return "tool_calls"
        return piece.finish_reason

    # --- one response ---

    async def _respond(self) -> None:
        wholes = [Whole() for _ in self.generation.answers]
        async for pieces in self.generation.steps():
            for piece in pieces:
                whole = wholes[piece.index]
                for part in self._parse(piece):
                    whole.content.append(part.content)
                    whole.reasoning.append(part.reasoning)
                    join_tool_calls(whole.tool_calls, part.tool_calls)
                whole.token_ids += piece.token_ids
                whole.scores += piece.scores or []
                whole.last = piece
        await self.exchange.respond_json(
            self.head
            | {
                "choices": [self._choice(index, whole) for index, whole in enumerate(wholes)],
                "service_tier": "default",
                "system_fingerprint": self.service.fingerprint,
                "usage": self.service.usage(self.generation, self.num_reasoning_tokens),
                "prompt_logprobs": None
                if self.body.prompt_logprobs is None
                else shown_prompt_logprobs(self.generation, 0),
                "prompt_token_ids": self.generation.prompts[0].token_ids if self.body.return_token_ids else None,
                "kv_transfer_params": None,
            }
        )

    def _choice(self, index: int, whole: Whole) -> dict[str, Any]:
        assert whole.last is not None
        reasoning = "".join(whole.reasoning) or None
        content = self.echoed + "".join(whole.content)
        return {
            "index": index,
            "message": {
                "role": self.role,
                "content": None if whole.tool_calls and not content else content,
                "refusal": None,
                "annotations": [],
                "audio": None,
                "tool_calls": whole.tool_calls,
                "reasoning": reasoning,
                "reasoning_content": reasoning,
            },
            "logprobs": None if not self.body.logprobs else self._logprobs(whole.scores),
            "finish_reason": self._finish_reason(whole.last),
            "stop_reason": whole.last.stop_reason,
            "token_ids": whole.token_ids if self.body.return_token_ids else None,
        }

    # --- streams ---

    async def _stream(self) -> None:
        options = self.body.stream_options
        has_usage = self.service.settings.enable_force_include_usage or bool(options and options.include_usage)
        is_continuous = bool(options and options.continuous_usage_stats and has_usage)
        plain = [] if self._has_details or is_continuous else self._text_frames()
        has_roles = False

        def framed(piece: Piece) -> bytes:
            parts = self._parse(piece)
            if plain and piece.finish_reason is None and len(parts) == 1 and parts[0].content:
                return plain[piece.index](parts[0].content)
            chunks = self._chunks(piece, parts, has_fingerprint=not has_usage)
            extra = {"usage": self.generation.answers[piece.index].usage()} if is_continuous else {}
            return b"".join(frame(chunk | extra) for chunk in chunks)

        seconds = self.service.settings.sse_keep_alive_interval
        async for pieces in steps_of(self.generation, self.exchange, seconds, framed if plain else None):
            # The first chunks are sent with the first output, so that an early error is a response of its own.
            frames = [] if has_roles else list(map(frame, self._first_chunks(is_continuous)))
            has_roles = True
            frames += map(framed, pieces)
            if not self.exchange.is_streaming:
                await self.exchange.start_stream()
            if data := b"".join(frames):
                await self.exchange.write(data)
        tail = b""
        if has_usage:
            end = self.head | {"choices": [], "usage": self.service.usage(self.generation, self.num_reasoning_tokens)}
            end["system_fingerprint"] = self.service.fingerprint
            tail = frame(end)
        await self.exchange.write(tail + DONE)
        await self.exchange.end_stream()

    def _first_chunks(self, is_continuous: bool) -> list[dict[str, Any]]:
        chunks = []
        for answer in self.generation.answers:
            extra = {"usage": usage_of(len(answer.prompt.token_ids), 0)} if is_continuous else {}
            choice: dict[str, Any] = {
                "index": answer.index,
                "delta": {"role": self.role, "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            chunk: dict[str, Any] = self.head | {"choices": [choice]} | extra
            if self.body.return_token_ids:
                chunk["prompt_token_ids"] = answer.prompt.token_ids
            chunks.append(chunk)
            if self.echoed:
                chunks.append(self.head | {"choices": [choice | {"delta": {"content": self.echoed}}]} | extra)
        return chunks

    @property
    def _has_details(self) -> bool:
        """Whether chunks have more than a part of the answer."""
        return bool(self.body.logprobs or self.body.return_token_ids)

    def _text_frames(self) -> list[TextFrame]:
        """The frames of content before the end, for each answer."""
        found = []
        for answer in self.generation.answers:
            piece = Piece(answer.index, PLACE, [], None, None, None)
            [chunk] = self._chunks(piece, [ParsedText(content=PLACE)], has_fingerprint=False)
            found.append(TextFrame(chunk))
        return found

    def _chunks(self, piece: Piece, parts: Sequence[ParsedText], *, has_fingerprint: bool) -> list[dict[str, Any]]:
        """One chunk, or several if the text has several parts; the last one has the end."""
        deltas = [delta for part in parts for delta in deltas_of(part)]
        is_end = piece.finish_reason is not None
        if not deltas:
            if not is_end and not self._has_details:
                return []  # an incomplete character, or the beginning of a stop string
            deltas = [{"content": ""}] if self._has_details else [{}]
        chunks = []
        for number, delta in enumerate(deltas, start=1):
            is_last = number == len(deltas)
            choice: dict[str, Any] = {
                "index": piece.index,
                "delta": delta,
                "logprobs": self._logprobs(piece.scores or []) if self.body.logprobs and is_last else None,
                "finish_reason": self._finish_reason(piece) if is_last else None,
            }
            if is_last and self.body.return_token_ids:
                choice["token_ids"] = piece.token_ids
            chunk = self.head | {"choices": [choice]}
            if is_last and is_end:
                choice["stop_reason"] = piece.stop_reason
                if has_fingerprint:
                    chunk["system_fingerprint"] = self.service.fingerprint
            chunks.append(chunk)
        return chunks

    # --- logprobs ---

    def _logprobs(self, rows: list[list[Score]]) -> dict[str, Any]:
        num_top = self.body.top_logprobs or 0
        return {
            "content": [
                self._entry(row[0])
                | {"top_logprobs": [self._entry(one) for one in sorted(row, key=lambda s: s.rank)[:num_top]]}
                for row in rows
            ]
        }

    def _entry(self, score: Score) -> dict[str, Any]:
        text = f"token_id:{score.token_id}" if self.body.return_tokens_as_token_ids else score.text
        return {"token": text, "logprob": score.logprob, "bytes": list(text.encode("utf-8", "replace"))}


def deltas_of(part: ParsedText) -> list[dict[str, Any]]:
    """The `delta` objects of a part; reasoning has vLLM's name and the older one."""
    deltas: list[dict[str, Any]] = []
    if part.reasoning:
        deltas.append({"reasoning": part.reasoning, "reasoning_content": part.reasoning})
    if part.content:
        deltas.append({"content": part.content})
    if part.tool_calls:
        deltas.append({"tool_calls": part.tool_calls})
    return deltas


def join_tool_calls(calls: list[dict[str, Any]], deltas: Sequence[dict[str, Any]]) -> None:
    """Adds the pieces of a stream to whole calls: the first piece of a call has its id and name."""
    for delta in deltas:
        index = delta.get("index", len(calls))
        function = delta.get("function", {})
        if index < len(calls):
            calls[index]["function"]["arguments"] += function.get("arguments", "")
        else:
            whole = {name: value for name, value in delta.items() if name != "index"}
            calls.append(whole | {"function": {"arguments": "", **function}})
