"""Structured output on every route that generates text, and its refusals."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from servers import NAME, TestServer

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
MESSAGES = [{"role": "user", "content": "def main("}]
LONG = {"max_tokens": 200, "temperature": 0}


@pytest.mark.parametrize("form", [{"response_format": FORMAT}, {"structured_outputs": {"json": SCHEMA}}])
def test_completions_and_chats_follow_a_schema(server: TestServer, form: dict[str, Any]) -> None:
    body = server.post("/v1/completions", {"prompt": ["def main(", "x"], **form, **LONG}).json()
    chat = server.post("/v1/chat/completions", {"messages": MESSAGES, **form, **LONG}).json()
    answers = [(one["text"], one["finish_reason"]) for one in body["choices"]]
    answers.append((chat["choices"][0]["message"]["content"], chat["choices"][0]["finish_reason"]))
    for text, reason in answers:
        assert reason == "stop"
        assert json.loads(text).keys() == {"ok", "kind"}


def test_a_stream_follows_a_grammar_and_says_when_it_is_cut(server: TestServer) -> None:
    body = {"prompt": "x", "structured_outputs": {"regex": "[0-9]{20}"}, "temperature": 0, "stream": True}
    lines = server.post("/v1/completions", {**body, "max_tokens": 4}).text.split("\n\n")
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if "{" in line]
    text = "".join(choice["text"] for choice in choices)
    assert text.isdigit() and len(text) < 20 and choices[-1]["finish_reason"] == "length"


def test_responses_follow_text_format(server: TestServer) -> None:
    form = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
    body = {"input": "def main(", "text": {"format": form}, "max_output_tokens": 200, "temperature": 0}
    found = server.post("/v1/responses", body).json()
    assert json.loads(found["output"][0]["content"][0]["text"]).keys() == {"ok", "kind"}
    assert found["text"]["format"] == form and found["status"] == "completed"


class Answer(BaseModel):
    ok: bool
    kind: str


def test_the_client_parses_a_typed_answer(server: TestServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    found = client.chat.completions.parse(
        model=NAME, messages=MESSAGES, response_format=Answer, max_tokens=400, temperature=1, seed=1
    )
    assert isinstance(found.choices[0].message.parsed, Answer)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "keyword 'uniqueItems' at $ is not enforced", None),
        ({"structured_outputs": {"regex": "("}}, "invalid regex", None),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "no text of the model's tokens has this form", None),
        ({"structured_outputs": {"regexp": "a"}}, "must have only the fields", None),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens must be 0", "min_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type must be one of text", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "must have a json_schema", "response_format"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "either structured_outputs or", None),
        ({"guided_json": {}}, "its successor is 'structured_outputs'", "guided_json"),
    ],
)
def test_refusals(server: TestServer, fields: dict[str, Any], message: str, param: str | None) -> None:
    response = server.post("/v1/completions", {"prompt": "x", **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and message in error["message"]
    assert error["param"] == (param or "structured_outputs")


def test_the_kinds_of_text_and_json_object(server: TestServer) -> None:
    plain = server.post("/v1/completions", {"prompt": "x", "response_format": {"type": "text"}})
    assert plain.status_code == 200
    body = {"prompt": "x", "response_format": {"type": "json_object"}, "max_tokens": 3, "temperature": 0}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"].lstrip().startswith("{")
