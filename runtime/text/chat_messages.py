"""Checks conversations in OpenAI's form, and writes their contents as the chat template expects them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from sageLLM.runtime.errors import PromptError

Message: TypeAlias = Mapping[str, Any]
Conversation: TypeAlias = Sequence[Message]

ContentForm: TypeAlias = Literal["text", "parts", "any"]
"""The contents that a template reads: texts only, lists of parts only, or both."""

_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)


def as_conversations(messages: object) -> tuple[list[Conversation], bool]:
    """The conversations, and whether they were a list of conversations. PromptError for other types and none at all."""
    must = "messages must be a list of {'role', 'content'} objects, or a list of such lists"
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"{must}, got {_kind(messages)}", "messages")
    if not messages:
        raise PromptError(f"{must}, got an empty list", "messages")
    is_batch = not isinstance(messages[0], Mapping)
    conversations = list(messages) if is_batch else [messages]
    for i, conversation in enumerate(conversations):
        place = f"messages[{i}]" if is_batch else "messages"
        if isinstance(conversation, str | bytes | Mapping) or not isinstance(conversation, Sequence):
            raise PromptError(
                f"{place} must be a list of {{'role', 'content'}} objects, got {_kind(conversation)}", place
            )
        if not conversation:
            raise PromptError(f"{place} must have at least one message", place)
    return conversations, is_batch


def check_template_options(tools: object, template_kwargs: object) -> None:
    """Raises PromptError for tools that are not objects and for template variables with reserved names."""
    if tools is not None:
        if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
            raise PromptError(f"tools must be a list of objects, got {_kind(tools)}", "tools")
        for i, tool in enumerate(tools):
            if not isinstance(tool, Mapping):
                raise PromptError(f"tools[{i}] must be an object such as a JSON schema, got {_kind(tool)}", "tools")
    if template_kwargs is None:
        return
    name = "chat_template_kwargs"
    if not isinstance(template_kwargs, Mapping) or not all(isinstance(key, str) for key in template_kwargs):
        raise PromptError(f"{name} must map names to values, got {_kind(template_kwargs)}", name)
    if reserved := sorted(_RESERVED & template_kwargs.keys()):
        raise PromptError(f"{name} must not contain {reserved[0]!r}, which chat sets itself", name)


def normalize(conversation: Conversation, form: ContentForm, place: str = "messages") -> list[dict[str, Any]]:
    """The messages with contents in the template's form, and arguments of tool calls as objects, as in vLLM.

    Several parts become one text with line breaks between them if the template reads texts only. Only parts with text
    are accepted: to drop an image would answer another question. A missing content, as of tool calls, is "".
    """
    return [_message(message, form, f"{place}[{i}]") for i, message in enumerate(conversation)]


def _message(message: object, form: ContentForm, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{place} must be an object with role and content, got {_kind(message)}", place)
    if not isinstance(message.get("role"), str):
        raise PromptError(f"{place}.role must be a text, got {_kind(message.get('role'))}", f"{place}.role")
    result = dict(message)
    result["content"] = _content(message.get("content"), form, f"{place}.content")
    if message.get("tool_calls") is not None:
        result["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}.tool_calls")
    return result


def _content(content: object, form: ContentForm, place: str) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        text = content or ""
        return [{"type": "text", "text": text}] if form == "parts" else text
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise PromptError(f"{place} must be a text or a list of parts, got {_kind(content)}", place)
    texts = [_part_text(part, f"{place}[{i}]") for i, part in enumerate(content)]
    return "\n".join(texts) if form == "text" else [{"type": "text", "text": text} for text in texts]


def _part_text(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    key = _TEXT_KEYS.get(kind) if isinstance(kind, str) else None
    if not isinstance(part, Mapping) or key is None:
        got = f"the type {kind!r}" if isinstance(kind, str) else _kind(part)
        raise PromptError(f"{place} must be a part of type 'text', got {got}; only text is supported", place)
    text = part.get(key)
    if not isinstance(text, str):
        raise PromptError(f"{place}.{key} must be a text, got {_kind(text)}", f"{place}.{key}")
    return text


def _tool_calls(calls: object, place: str) -> list[Any]:
    if isinstance(calls, str | bytes) or not isinstance(calls, Sequence):
        raise PromptError(f"{place} must be a list, got {_kind(calls)}", place)
    return [_tool_call(call, f"{place}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: object, place: str) -> dict[str, Any]:
    """The call with its arguments as an object; OpenAI's interface has them as JSON in a text."""
    if not isinstance(call, Mapping):
        raise PromptError(f"{place} must be an object, got {_kind(call)}", place)
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return dict(call)
    place = f"{place}.function.arguments"
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{place} must be JSON: {error}", place) from None
    if not isinstance(parsed, dict):
        raise PromptError(f"{place} must be a JSON object, got {_kind(parsed)}", place)
    return {**call, "function": {**function, "arguments": parsed}}


def _kind(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
