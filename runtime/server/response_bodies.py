"""Bodies of /v1/responses as chats: instructions, input items, function tools, and the form of the text."""

from __future__ import annotations

from typing import Any

from sageLLM.runtime.server.bodies import ChatBody, ResponsesBody
from sageLLM.runtime.server.errors import ApiError

TEXT_PARTS = ("input_text", "output_text", "text")
ITEMS = "message, reasoning, function_call or function_call_output"


def as_chat(body: ResponsesBody) -> ChatBody:
    """The conversation, the tools and the sampling parameters as a chat. Raises ApiError 400."""
    for name, value in (("previous_response_id", body.previous_response_id), ("conversation", body.conversation)):
        if value is not None:
            raise ApiError(400, f"{name} is not supported: the server keeps no responses; send the whole input", name)
    if body.background:
        raise ApiError(400, "background is not supported: the server keeps no responses", "background")
    if body.truncation not in (None, "disabled"):
        raise ApiError(400, "truncation must be 'disabled'", "truncation")
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise ApiError(400, "reasoning.effort must be a text", "reasoning")
    return ChatBody(
        messages=_messages(body),
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
        response_format=_response_format(text_format(body)),
        tools=[_tool(tool, f"tools[{number}]") for number, tool in enumerate(body.tools or [])],
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
    )


def text_format(body: ResponsesBody) -> dict[str, Any]:
    form = (body.text or {}).get("format") or {"type": "text"}
    if not isinstance(form, dict):
        raise ApiError(400, f"text.format must be an object, got a {type(form).__name__}", "text")
    return form


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    """`text.format` in the form of chats: it has the fields of `json_schema` itself."""
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _tool(tool: object, place: str) -> dict[str, Any]:
    """A function in the form of chats, in which its fields are in `function`."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else type(tool).__name__
        raise ApiError(400, f"{place} must be of type 'function', got {str(kind)[:60]!r}", "tools")
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in fields if tool.get(name) is not None}}


def _tool_choice(choice: object) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice is None or isinstance(choice, str):
        return choice
    raise ApiError(400, "tool_choice must be a text or {'type': 'function', 'name': NAME}", "tool_choice")


def _messages(body: ResponsesBody) -> list[Any]:
    """The messages of all items; calls that follow one another, or a message, belong to one message."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for number, item in enumerate(items):
        place = f"input[{number}]"
        if not isinstance(item, dict):
            raise ApiError(400, f"{place} must be an object", "input")
        match item.get("type", "message"):
            case "reasoning":
                continue  # chat templates leave out the reasoning of earlier answers
            case "message" if isinstance(item.get("role"), str):
                role = "system" if item["role"] == "developer" else item["role"]
                messages.append({"role": role, "content": _text(item.get("content"), f"{place}.content")})
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                messages[-1].setdefault("tool_calls", []).append(_call(item, place))
            case "function_call_output":
                name, output = item.get("call_id"), item.get("output")
                if not isinstance(name, str):
                    raise ApiError(400, f"{place}.call_id must be a text", "input")
                text = _text(output, f"{place}.output")
                messages.append({"role": "tool", "tool_call_id": name, "content": text})
            case _:
                raise ApiError(400, f"{place} must be a {ITEMS}; a message has role and content", "input")
    return messages


def _call(item: dict[str, Any], place: str) -> dict[str, Any]:
    fields = {name: item.get(name) for name in ("call_id", "name", "arguments")}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ApiError(400, f"{place}.{name} must be a text", "input")
    function = {"name": fields["name"], "arguments": fields["arguments"]}
    return {"id": fields["call_id"], "type": "function", "function": function}


def _text(content: object, place: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{place} must be a text or a list of parts", "input")
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{place}[{number}] must be a part of type input_text with a text", "input")
        texts.append(part["text"])
    return "\n".join(texts)
