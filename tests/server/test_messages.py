"""/v1/messages through Anthropic's client: whole and streamed answers, blocks, stop reasons, usage and errors."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from servers import NAME, TestServer

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.server.bodies import MessagesBody
from sageLLM.runtime.server.errors import ApiError
from sageLLM.runtime.server.message_bodies import as_chat

QUESTION = [{"role": "user", "content": "def main("}]


@pytest.fixture
def client(server: TestServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def test_a_message_is_the_answer_of_llm(client: anthropic.Anthropic, llm: LLM) -> None:
    [expected] = llm.generate("def main(", SamplingParams(max_tokens=12, temperature=0))
    found = client.messages.create(model=NAME, max_tokens=12, messages=QUESTION, extra_body={"temperature": 0})
    [block] = found.content
    assert (block.type, block.text) == ("text", expected.outputs[0].text)
    assert (found.stop_reason, found.role, found.model) == ("max_tokens", "assistant", NAME)
    cached = found.usage.cache_read_input_tokens or 0
    assert found.usage.input_tokens + cached == len(expected.prompt_token_ids) and found.usage.output_tokens == 12


def test_a_stream_has_the_events_of_the_message(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": NAME, "max_tokens": 24, "messages": QUESTION, "stop_sequences": [".text"]}
    whole = client.messages.create(**options, extra_body={"temperature": 0})
    with client.messages.stream(**options, extra_body={"temperature": 0}) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_message()
    assert found.content[0].text == whole.content[0].text and found.stop_reason == whole.stop_reason == "stop_sequence"
    assert found.stop_sequence == whole.stop_sequence == ".text"
    assert found.usage.output_tokens == whole.usage.output_tokens
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1


def test_an_answer_by_a_schema(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    found = client.messages.create(
        model=NAME,
        max_tokens=200,
        messages=QUESTION,
        output_config={"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}},
    )
    assert found.stop_reason == "end_turn"
    assert json.loads(found.content[0].text).keys() == {"ok"}


def test_an_answer_is_limited_by_the_context(client: anthropic.Anthropic) -> None:
    question = [{"role": "user", "content": "self.text, " * 100}]
    found = client.messages.create(model=NAME, max_tokens=4000, messages=question)
    num_prompt = found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0)
    assert num_prompt + found.usage.output_tokens <= 512
    assert found.stop_reason in ("end_turn", "model_context_window_exceeded")


def test_tokens_are_counted_with_the_system_text(client: anthropic.Anthropic) -> None:
    alone = client.messages.count_tokens(model=NAME, messages=QUESTION).input_tokens
    found = client.messages.count_tokens(model=NAME, messages=QUESTION, system="import os\n").input_tokens
    assert alone == 3 and found > alone


def test_blocks_become_messages_of_a_chat() -> None:
    call = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "3"}]}
    body = MessagesBody(
        max_tokens=5,
        system=[{"type": "text", "text": "Be short."}],
        thinking={"type": "disabled"},
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, call]},
            {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
            {"role": "assistant", "content": "It is"},
        ],
    )
    chat = as_chat(body)
    assert chat.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1 + 2?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "It is"},
    ]
    assert chat.continue_final_message and not chat.add_generation_prompt
    assert chat.chat_template_kwargs == {"enable_thinking": False}


def test_tools_have_the_form_of_chats() -> None:
    tool = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}
    choice = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
    chat = as_chat(MessagesBody(max_tokens=5, messages=QUESTION, tools=[tool], tool_choice=choice))
    function = {"name": "add", "parameters": {"type": "object"}, "description": "Adds."}
    assert chat.tools == [{"type": "function", "function": function}]
    assert chat.tool_choice == {"type": "function", "function": {"name": "add"}} and not chat.parallel_tool_calls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "tool"}]}, "messages[0] must be an object with role 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "tool_result, got 'image'"),
        ({"system": [{"type": "image"}]}, "system[0] must be a text block"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "must be a tool of type 'custom'"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type must be one of auto, any, none and tool"),
        ({"thinking": {"type": "on"}}, "thinking.type must be one of enabled, adaptive, disabled"),
        ({"output_config": {"format": {"type": "xml"}}}, "must be an object of type json_schema"),
    ],
)
def test_bodies_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        as_chat(MessagesBody(**{"max_tokens": 5, "messages": QUESTION, **fields}))
    assert message in caught.value.message


def test_errors_have_the_form_that_clients_read(client: anthropic.Anthropic, server: TestServer) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens must be an integer from 1"):
        client.messages.create(model=NAME, max_tokens=0, messages=QUESTION)
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="other", max_tokens=5, messages=QUESTION)
    body = server.post("/v1/messages", {"messages": QUESTION}).json()
    assert body["type"] == "error" and body["error"]["message"] == "max_tokens is required"
