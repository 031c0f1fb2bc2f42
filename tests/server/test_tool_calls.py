"""Tool calls and reasoning in chats, with scripted answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import anthropic
import openai
import pytest
from servers import NAME, ScriptedChannel, TestServer, running, tokenizer

from sageLLM.generated.dialects import DIALECTS
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams
from sageLLM.runtime.server.dialects import choose_dialects
from sageLLM.runtime.server.tools import ToolUse

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
USER = [{"role": "user", "content": "Weather?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
ANSWER = f"<think>\nWhich city?\n</think>\n\nI will look.\n{CALL}\n{CALL}"
TEMPLATE = """{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{% for m in messages %}{{ m.role }}:{{
m.content }}{% for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": {{
call.function.arguments | tojson }}}</tool_call>{% endfor %}{{ m.tool_call_id or '' }}
{% endfor %}{% if open_reasoning %}<think>{% endif %}{# </think> "arguments": #}"""


class Scripted:
    """A server with an engine that answers every request with a text, a few tokens at a time."""

    def __init__(self, server: TestServer, channel: ScriptedChannel) -> None:
        self.server, self._channel = server, channel
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)

    def answer(self, text: str, reason: str = "stop", size: int = 3) -> threading.Thread:
        """Answers the next request, in a thread."""
        ids = tokenizer().encode(text, add_special_tokens=False)
        pieces = [ids[start : start + size] for start in range(0, len(ids), size)] or [[]]

        num_before = len(self._channel.submitted)

        def run() -> None:
            while len(self._channel.submitted) == num_before:  # an abort arrives too
                assert self._channel.arrived.acquire(timeout=20)
            name = list(self._channel.submitted)[-1]
            for piece in pieces:
                self._channel.emit_tokens(name, piece)
            # the model's end-of-sequence token ends the text by rule
            if reason == "stop":
                self._channel.emit_tokens(name, [0], "stop")
            else:
                self._channel.emit_tokens(name, [], reason)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def prompt(self) -> str:
        """The text of the last prompt."""
        return tokenizer().decode(list(self._channel.submitted.values())[-1].token_ids)

    def chat(self, text: str, size: int = 3, **fields: Any) -> Any:
        thread = self.answer(text, size=size)
        body = {"model": NAME, "messages": USER, "tools": [TOOL]} | fields
        answer = self.client.chat.completions.create(**body)
        if fields.get("stream"):
            answer = list(answer)
        thread.join(30)
        return answer


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    channel = ScriptedChannel()
    with running(lambda: channel, chat_template=template) as server:
        yield Scripted(server, channel)


def joined(chunks: Sequence[Any]) -> dict[str, Any]:
    """The whole answer of a stream, in the form of a message, with its finish reason."""
    content, reasoning, calls, reason = "", "", [], None
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        for piece in choice.delta.tool_calls or []:
            if piece.id is not None:
                assert piece.index == len(calls) and piece.type == "function" and piece.function.arguments == ""
                calls.append({"id": piece.id, "name": piece.function.name, "arguments": ""})
            else:
                calls[piece.index]["arguments"] += piece.function.arguments
        reason = choice.finish_reason or reason
    return {"content": content, "reasoning": reasoning, "calls": calls, "finish_reason": reason}


def test_a_whole_answer(scripted: Scripted) -> None:
    answer = scripted.chat(ANSWER)
    [choice] = answer.choices
    message = choice.message
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens
    assert (choice.finish_reason, message.content) == ("tool_calls", "I will look.")
    assert message.reasoning == message.reasoning_content == "Which city?"
    assert [call.function.name for call in message.tool_calls] == ["get_weather"] * 2
    assert all(json.loads(call.function.arguments) == {"city": "Zürich"} for call in message.tool_calls)
    ids = {call.id for call in message.tool_calls}
    assert len(ids) == 2 and all(one.startswith("chatcmpl-tool-") for one in ids)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_has_the_same_parts(scripted: Scripted, size: int) -> None:
    found = joined(scripted.chat(ANSWER, size, stream=True))
    assert (found["content"], found["reasoning"], found["finish_reason"]) == (
        "I will look.",
        "Which city?",
        "tool_calls",
    )
    assert [(call["name"], json.loads(call["arguments"])) for call in found["calls"]] == [
        ("get_weather", {"city": "Zürich"})
    ] * 2


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_message_has_the_parts_as_blocks(scripted: Scripted, is_streamed: bool) -> None:
    """/v1/messages with Anthropic's client: thinking, text and tool_use."""
    client = anthropic.Anthropic(base_url=scripted.server.url, api_key="none", max_retries=0, timeout=20)
    tool = {"name": "get_weather", "description": "Looks.", "input_schema": PARAMETERS}
    thread = scripted.answer(ANSWER)
    body: dict[str, Any] = {"model": NAME, "max_tokens": 200, "messages": USER, "tools": [tool]}
    if is_streamed:
        with client.messages.stream(**body) as stream:
            found = stream.get_final_message()
    else:
        found = client.messages.create(**body)
    thread.join(30)
    thinking, text, *calls = found.content
    assert (thinking.type, thinking.thinking.strip()) == ("thinking", "Which city?")
    assert (text.type, text.text.strip()) == ("text", "I will look.")
    assert [(call.type, call.name, call.input) for call in calls] == [
        ("tool_use", "get_weather", {"city": "Zürich"})
    ] * 2
    assert found.stop_reason == "tool_use" and calls[0].id != calls[1].id
    assert "get_weather;" in scripted.prompt()


def test_content_is_null_if_there_are_only_calls(scripted: Scripted) -> None:
    assert scripted.chat(CALL).choices[0].message.content is None


def test_one_call_at_a_time(scripted: Scripted) -> None:
    assert len(scripted.chat(ANSWER, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert len(joined(scripted.chat(ANSWER, parallel_tool_calls=False, stream=True))["calls"]) == 1


@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}])
def test_without_tools_calls_are_content(scripted: Scripted, fields: dict[str, Any]) -> None:
    [choice] = scripted.chat(CALL, **fields).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", CALL, [])


def test_reasoning_can_be_left_out(scripted: Scripted) -> None:
    for stream in (False, True):
        answer = scripted.chat(ANSWER, stream=stream, extra_body={"include_reasoning": False})
        assert "Which city" not in str(answer) and "I will" in str(answer)


def test_a_prompt_that_opens_reasoning(scripted: Scripted) -> None:
    fields = {"extra_body": {"chat_template_kwargs": {"open_reasoning": True}}}
    message = scripted.chat(f"Hm.\n</think>\n\n{CALL}", **fields).choices[0].message
    assert (message.reasoning, message.content, len(message.tool_calls)) == ("Hm.", None, 1)


def test_a_structured_answer_follows_the_reasoning(scripted: Scripted) -> None:
    """In the form itself nothing is a mark."""
    fields = {"tools": None, "response_format": {"type": "json_object"}}
    form = '{"a": "<think>", "b": "</think><tool_call>"}'

    def parts(text: str, **variables: bool) -> tuple[str | None, str | None]:
        found = joined(scripted.chat(text, stream=True, **fields, extra_body={"chat_template_kwargs": variables}))
        message = scripted.chat(text, **fields, extra_body={"chat_template_kwargs": variables}).choices[0].message
        assert (message.content or "", message.reasoning or "") == (found["content"], found["reasoning"])
        return message.reasoning, message.content

    assert parts(form) == (None, form)
    assert parts(f"<think>\nHm. {{}}\n</think>\n\n{form}") == ("Hm. {}", form)
    assert parts(f"Hm.\n</think>\n\n{form}", open_reasoning=True) == ("Hm.", form)


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}},
        {"regex": "[0-9]+"},
        {"choice": ["yes", "no"]},
        {"grammar": 'start: "x" tail\ntail: "y"'},
        {"json_object": True},
        {"structural_tag": {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}]}},
    ],
)
def test_the_grammar_begins_after_the_reasoning(scripted: Scripted, form: dict[str, Any]) -> None:
    """For every kind of form, and for a prompt that has opened the reasoning or not."""
    texts = {"json": '{"a": 1}', "regex": "12", "choice": "no", "grammar": "xy", "json_object": "{}"}
    text = texts.get(next(iter(form)), "free text <f>1</f>")
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**form))
    service, use = scripted.server.service, ToolUse()
    assert service.grammars is not None
    free = "structural_tag" in form

    def admits(answer: str, prompt: str) -> bool:
        found = service.constrain(params, use, prompt).structured_outputs
        assert found is not None and service.grammars is not None
        matcher = service.grammars.matcher(found, service.eos_ids)
        ids = [*tokenizer().encode(answer, add_special_tokens=False), *sorted(service.eos_ids)[:1]]
        return bool(matcher.consume_tokens(ids)) and matcher.is_stopped()

    for thought in ("", "So. {}</thin", "a\n\nb"):
        assert admits(f"<think>\n{thought}\n</think>\n\n{text}", "user:")
        assert admits(f"{thought}\n</think>\n\n{text}", "user:<think>")
    assert admits(text, "user:")
    assert not admits(text, "user:<think>"), "the reasoning is not closed"
    assert free or not admits(f"Well, {text}", "user:")
    assert free or not admits(f"<think>\na\n</think>\n\nWell, {text}", "user:")


def test_an_answer_that_is_cut_keeps_the_reason(scripted: Scripted) -> None:
    thread = scripted.answer(CALL[:60], "length")
    body = {"model": NAME, "messages": USER, "tools": [TOOL], "max_tokens": len(tokenizer().encode(CALL[:60], False))}
    [choice] = scripted.client.chat.completions.create(**body).choices  # type: ignore[call-overload]
    thread.join(30)
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments in CALL


def test_a_broken_call_is_content(scripted: Scripted) -> None:
    [choice] = scripted.chat('<tool_call>{"name": 5}</tool_call>').choices
    assert (choice.finish_reason, choice.message.content) == ("stop", '<tool_call>{"name": 5}</tool_call>')


def test_the_template_receives_tools_calls_and_results(scripted: Scripted) -> None:
    first = scripted.chat(CALL).choices[0].message
    messages = [*USER, first.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": "c1", "content": "rain"}]
    scripted.chat("It rains.", messages=messages)
    assert scripted.prompt() == (
        "get_weather;user:Weather?\nassistant:"
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>\n'
        "tool:rainc1\n"
    )


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", r"tools\[0\] must be an object of type 'function'"),
        ({"tools": ["f"]}, "tools", r"tools\[0\] must be an object of type 'function'"),
        ({"tools": [{"type": "function"}]}, "tools", r"tools\[0\].function must be an object with a name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "must have 1 to 64 letters"),
        ({"tools": [TOOL, TOOL]}, "tools", "names must be unique"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools", "a JSON schema"),
        ({"tools": [TOOL] * 300}, "tools", "at most 256 entries"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "must be 'none', 'auto', 'required' or"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "must be {'type': 'function'"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "does not match any",
        ),
        ({"tool_choice": "required"}, "tool_choice", "`tools` must be set"),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "cannot be combined with structured output",
        ),
        (
            {"tools": [function("f", {"type": "string", "contains": 1})], "tool_choice": "required"},
            "tools",
            "the keyword 'contains' at",
        ),
    ],
)
def test_invalid_tools_are_refused(scripted: Scripted, fields: dict[str, Any], param: str, message: str) -> None:
    response = scripted.server.post("/v1/chat/completions", {"messages": USER} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["message"])


# the Responses API

FUNCTION = {"type": "function", **TOOL["function"]}


def respond(scripted: Scripted, text: str, **fields: Any) -> Any:
    thread = scripted.answer(text)
    body = {"model": NAME, "input": "Weather?", "tools": [FUNCTION]} | fields
    answer = scripted.client.responses.create(**body)
    if fields.get("stream"):
        answer = list(answer)
    thread.join(30)
    return answer


def test_a_response_has_items(scripted: Scripted) -> None:
    response = respond(scripted, ANSWER)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    thought, message, call, other = response.output
    assert (thought.content[0].text, message.content[0].text) == ("Which city?", "I will look.")
    assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"city": "Zürich"}, "completed")
    assert call.call_id != other.call_id and len({item.id for item in response.output}) == 4
    assert response.status == "completed" and response.usage.output_tokens_details.reasoning_tokens > 0


def test_a_streamed_response_has_the_same_items(scripted: Scripted) -> None:
    events = respond(scripted, ANSWER, stream=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    shown = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    text = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    arguments = [kind.format("function_call_arguments") for kind in text if "content_part" not in kind]
    assert shown == [
        *("created", "in_progress"),
        *(kind.format("reasoning_text") for kind in text),
        *(kind.format("output_text") for kind in text),
        *arguments,
        *arguments,
        "completed",
    ]
    output = events[-1].response.output
    assert [item.type for item in output] == ["reasoning", "message", "function_call", "function_call"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == output
    for index, item in enumerate(output):
        deltas = [event.delta for event in events if "delta" in event.type and event.output_index == index]
        whole = item.arguments if item.type == "function_call" else item.content[0].text
        assert "".join(deltas) == whole


def test_results_of_calls_are_messages(scripted: Scripted) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Bern"}'}
    items = [*USER, {"type": "reasoning", "summary": []}, call, call | {"call_id": "c2"}]
    items += [{"type": "function_call_output", "call_id": name, "output": "rain"} for name in ("c1", "c2")]
    respond(scripted, "It rains.", input=items)
    shown = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'
    assert scripted.prompt() == f"get_weather;user:Weather?\nassistant:{shown}{shown}\ntool:rainc1\ntool:rainc2\n"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", r"tools\[0\] must be of type 'function', got 'web_search'"),
        ({"tools": [TOOL]}, "tools", r"tools\[0\].function must be an object with a name"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "must be a text or {'type': 'function', 'name': NAME}"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input", "arguments must be a text"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input", "output must be a text or a list"),
        ({"input": [{"type": "file_search_call"}]}, "input", "must be a message, reasoning, function_call"),
    ],
)
def test_invalid_responses_are_refused(scripted: Scripted, fields: dict[str, Any], param: str, message: str) -> None:
    response = scripted.server.post("/v1/responses", {"input": "a", "tools": [FUNCTION]} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["message"])


# forced calls of the real model

SHORT = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Zürich"]}}, "required": ["city"]}
SHORT |= {"additionalProperties": False}
FORCED = [function("first", SHORT), function("second", SHORT)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_forced_calls(server: TestServer, choice: str, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    named = {"type": "function", "function": {"name": "second"}}
    body = {"model": NAME, "messages": USER, "tools": FORCED, "max_tokens": 100, "temperature": 0, "stream": stream}
    fields = {"tool_choice": named if choice == "named" else choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**body, **fields)  # type: ignore[call-overload]
    if stream:
        found = joined(list(answer))
        reason, [(name, arguments)] = (
            found["finish_reason"],
            [(one["name"], one["arguments"]) for one in found["calls"]],
        )
    else:
        [choice_found] = answer.choices
        reason, [call] = choice_found.finish_reason, choice_found.message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        assert choice_found.message.content is None
    assert json.loads(arguments)["city"] in ("Oslo", "Zürich")
    assert (name, reason) == ("second", "stop") if choice == "named" else reason == "tool_calls"


def test_a_forced_call_of_a_response(server: TestServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    tools = [{"type": "function", **tool["function"]} for tool in FORCED]
    choice = {"type": "function", "name": "second"}
    body = {"model": NAME, "input": "a", "tools": tools, "tool_choice": choice, "max_output_tokens": 100}
    [item] = client.responses.create(**body, temperature=0).output  # type: ignore[call-overload]
    assert (item.type, item.name) == ("function_call", "second")
    assert json.loads(item.arguments)["city"] in ("Oslo", "Zürich")


def test_tools_require_a_dialect() -> None:
    channel = ScriptedChannel()
    with running(lambda: channel) as server:
        response = server.post("/v1/chat/completions", {"messages": USER, "tools": [TOOL]})
        assert response.status_code == 400 and "--tool-call-parser" in response.json()["error"]["message"]
        assert str(server.service.dialects.for_calls).startswith("tool calls: none (no marks")


# the choice of a dialect

QWEN3 = '<tool_call>\n{"name": "\' + name + \'", "arguments": \' + arguments + \'}\n</tool_call> </think>'
TEMPLATES = {
    QWEN3: ("hermes", "think"),
    '<tool_call> </tool_call> <function= <parameter= "arguments":': ("hermes", None),
    "<tool_call> </tool_call> <function= <parameter= ": ("qwen3_coder", None),
    "{'[TOOL_CALLS]' + name + '[ARGS]'} [THINK][/THINK]": ("mistral", "mistral"),
    "[TOOL_CALLS] [": ("mistral_v3", None),
    "<|channel|>analysis <|channel|>commentary to=functions.": ("harmony", "harmony"),
    "{{ messages }}": (None, None),
}


def names(template: str, calls: str | None = None, reasoning: str | None = None) -> tuple[str | None, str | None]:
    found = choose_dialects(DIALECTS, template, calls, reasoning)
    return tuple(one.dialect and one.dialect.name for one in (found.for_calls, found.for_reasoning))  # type: ignore[return-value]


def test_the_dialect_is_that_of_the_template() -> None:
    assert {template: names(template) for template in TEMPLATES} == TEMPLATES


def test_a_dialect_by_name() -> None:
    assert names(QWEN3, "mistral", "none") == ("mistral", None)
    assert names("[TOOL_CALLS]", "mistral", "deepseek_r1") == ("mistral_v3", "think")
    assert names("", "openai", "openai_gptoss") == ("harmony", "harmony")
    with pytest.raises(SageError, match=r"--tool-call-parser must be .*, got 'hermse'; did you mean 'hermes'"):
        names("", "hermse")
    with pytest.raises(SageError, match=r"--reasoning-parser must be .*, got 'pythonic'; known are deep"):
        names("", None, "pythonic")
