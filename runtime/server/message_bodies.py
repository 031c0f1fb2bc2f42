"""Bodies of Anthropic's /v1/messages as chats: system texts, content blocks, tools and their results."""

from __future__ import annotations

import json
from typing import Any

from sageLLM.runtime.server.bodies import ChatBody, MessagesBody
from sageLLM.runtime.server.errors import ApiError

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
THINKING = {"enabled": True, "adaptive": True, "disabled": False}


def as_chat(body: MessagesBody) -> ChatBody:
    """The conversation, the tools and the sampling parameters without max_tokens as a chat. Raises ApiError 400."""
    messages = [] if body.system is None else [{"role": "system", "content": _text(body.system, "system")}]
    for number, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{number}]")
    continues = bool(body.messages) and body.messages[-1].get("role") == "assistant"
    return ChatBody(
        messages=messages,
        model=body.model,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        stream=body.stream,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        chat_template_kwargs=_variables(body),
        response_format=_format(body),
        tools=None if body.tools is None else [_tool(one, f"tools[{i}]") for i, one in enumerate(body.tools)],
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=not (body.tool_choice or {}).get("disable_parallel_tool_use", False),
    )


def _tool(tool: object, place: str) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
        kind = tool.get("type") if isinstance(tool, dict) else type(tool).__name__
        raise _error(f"{place} must be a tool of type 'custom', which the client runs, got {kind!r:.60}", "tools")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    if "description" in tool:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _choice(choice: dict[str, Any] | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in CHOICES:
        rule = f"tool_choice.type must be one of {', '.join(CHOICES)} and tool"
        raise _error(f"{rule}, got {kind!r:.60}", "tool_choice")
    return CHOICES[kind]


def _messages(message: object, place: str) -> list[dict[str, Any]]:
    """The messages of one: the results of tools become messages of role `tool`, before the text."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        raise _error(f"{place} must be an object with role 'user' or 'assistant'")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise _error(f"{place}.content must be a text or a list of blocks")
    results, texts, calls = [], [], []
    for number, block in enumerate(content):
        inner = f"{place}.content[{number}]"
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking" | "redacted_thinking"}:
                continue  # chat templates leave out the reasoning of earlier answers
            case {"type": "tool_result", "tool_use_id": str(name)} if role == "user":
                text = _text(block.get("content") or "", f"{inner}.content")
                results.append({"role": "tool", "tool_call_id": name, "content": text})
            case {"type": "tool_use", "id": str(name), "name": str(function), "input": dict(values)} if role != "user":
                call = {"name": function, "arguments": json.dumps(values, ensure_ascii=False)}
                calls.append({"id": name, "type": "function", "function": call})
            case _:
                kind = block.get("type") if isinstance(block, dict) else type(block).__name__
                raise _error(f"{inner} must be a block of text, thinking, tool_use or tool_result, got {kind!r:.60}")
    if not (texts or calls):
        return results
    own: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    return [*results, own | {"tool_calls": calls} if calls else own]


def _text(content: object, place: str) -> str:
    """The text of a text or of a list of text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _error(f"{place} must be a text or a list of text blocks", place.partition("[")[0])
    for number, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise _error(f"{place}[{number}] must be a text block", place.partition("[")[0])
    return "\n".join(block["text"] for block in content)


def _variables(body: MessagesBody) -> dict[str, Any] | None:
    variables: dict[str, Any] = {}
    if body.thinking is not None:
        kind = body.thinking.get("type")
        if not isinstance(kind, str) or kind not in THINKING:
            raise _error(f"thinking.type must be one of {', '.join(THINKING)}, got {kind!r:.60}", "thinking")
        variables["enable_thinking"] = THINKING[kind]
    effort = (body.output_config or {}).get("effort")
    if effort is not None:
        variables["reasoning_effort"] = effort
    return {**variables, **(body.chat_template_kwargs or {})} or None


def _format(body: MessagesBody) -> dict[str, Any] | None:
    form = (body.output_config or {}).get("format")
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        raise _error("output_config.format must be an object of type json_schema", "output_config")
    return {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}


def _error(message: str, param: str = "messages") -> ApiError:
    return ApiError(400, message, param)
