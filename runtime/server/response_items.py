"""Output items of /v1/responses: reasoning, messages and function calls, with the events of their growth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from sageLLM.runtime.server.output_parser import ParsedText

Kind = Literal["message", "reasoning", "function_call"]
EmitEvent = Callable[..., bytes]
PREFIXES: dict[Kind, str] = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
TEXTS = {"message": "output_text", "reasoning": "reasoning_text"}


class OutputItems:
    """The items of an answer. Each part continues the open item, or begins the next one.

    `event` makes an event of a kind and its fields.
    """

    def __init__(self, request_id: str, event: EmitEvent) -> None:
        self.items: list[dict[str, Any]] = []
        self._request_id, self._event = request_id, event
        self._open: Kind | None = None

    def add(self, part: ParsedText) -> Iterator[bytes]:
        """The events of a part."""
        if part.reasoning:
            yield from self._extend("reasoning", part.reasoning)
        if part.content:
            yield from self._extend("message", part.content)
        for call in part.tool_calls:
            function = call["function"]
            if "id" in call:
                yield from self._begin("function_call", call_id=call["id"], name=function["name"], arguments="")
            if arguments := function["arguments"]:
                self.items[-1]["arguments"] += arguments
                yield self._event("response.function_call_arguments.delta", **self._place(), delta=arguments)

    def end(self, status: str) -> Iterator[bytes]:
        """Closes the open item; an answer without any has an empty message."""
        if not self.items:
            yield from self._begin("message")
        yield from self._close(status)

    # --- one item ---

    def _begin(self, kind: Kind, **fields: Any) -> Iterator[bytes]:
        yield from self._close("completed")
        self._open = kind
        count = len(self.items)
        suffix = f"_{count}" if count else ""
        item = {"id": f"{PREFIXES[kind]}_{self._request_id}{suffix}", "type": kind, "status": "in_progress", **fields}
        if kind == "message":
            item["role"] = "assistant"
        if kind == "reasoning":
            item |= {"summary": [], "encrypted_content": None}
        if kind != "function_call":
            item["content"] = []
        self.items.append(item)
        yield self._event("response.output_item.added", output_index=count, item=item)
        if kind != "function_call":
            part = {"type": TEXTS[kind], "text": ""}
            item["content"] = [part | {"annotations": [], "logprobs": []} if kind == "message" else part]
            yield self._event("response.content_part.added", **self._place(), content_index=0, part=item["content"][0])

    def _extend(self, kind: Kind, text: str) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._begin(kind)
        self.items[-1]["content"][0]["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{TEXTS[kind]}.delta", **self._place(), content_index=0, delta=text, **extra)

    def _close(self, status: str) -> Iterator[bytes]:
        if self._open is None:
            return
        item, kind = self.items[-1], self._open
        item["status"], self._open = status, None
        if kind == "function_call":
            fields = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._place(), **fields)
        else:
            part = item["content"][0]
            place = self._place() | {"content_index": 0}
            extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            yield self._event(f"response.{TEXTS[kind]}.done", **place, text=part["text"], **extra)
            yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
