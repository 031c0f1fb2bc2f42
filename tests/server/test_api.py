"""The routes of the server: answers equal those of `LLM`, and every error is an error object."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx2
import numpy as np
import pytest
from servers import MODEL, NAME, TestServer

from sageLLM import LLM, SamplingParams

GREEDY = {"temperature": 0, "max_tokens": 12}


def chunks_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The objects of a stream; it must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    [(name, error)] = response.json().items()
    assert name == "error" and error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


@pytest.mark.parametrize(
    ("role", "text"),
    [("decode", "no worker has a role: the engine was not started with"), ("both", "role: ")],
)
def test_roles_need_workers(server: TestServer, role: str, text: str) -> None:
    answer = server.post("/v1/workers/0/role", {"role": role})
    assert answer.status_code == 400 and text in answer.json()["error"]["message"], answer.text


def test_a_completion_is_that_of_llm(server: TestServer, llm: LLM) -> None:
    [expected] = llm.generate("def main(", SamplingParams(max_tokens=12, temperature=0))
    body = server.post("/v1/completions", {"prompt": "def main(", "model": NAME, **GREEDY}).json()
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.outputs[0].text, "length")
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == NAME
    num_prompt = len(expected.prompt_token_ids)
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        num_prompt,
        12,
        num_prompt + 12,
    )


@pytest.mark.parametrize("stop", [None, "self", ["\n", "self."]])
def test_prompts_in_all_forms_with_stop_strings(server: TestServer, llm: LLM, stop: Any) -> None:
    prompts = ["import os\n", "class A:", "return"]
    expected = [o.outputs[0] for o in llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0, stop=stop))]
    ids = [server.post("/tokenize", {"prompt": prompt}).json()["tokens"] for prompt in prompts]
    for form in (prompts, ids):
        body = {"prompt": form, "max_tokens": 24, "temperature": 0, "stop": stop, "return_token_ids": True}
        choices = server.post("/v1/completions", body).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        found = [(c["text"], c["finish_reason"], c["stop_reason"], tuple(c["token_ids"])) for c in choices]
        assert found == [(e.text, e.finish_reason, e.stop_reason, e.token_ids) for e in expected]


@pytest.mark.parametrize(
    "body", [{"n": 3, "seed": 5, "temperature": 1.0}, {"prompt": ["a", "b = "], "n": 2, "seed": 1}]
)
def test_a_stream_joined_is_the_whole_answer(server: TestServer, body: dict[str, Any]) -> None:
    body = {"prompt": "def main(", "max_tokens": 20, "logprobs": 2, "stop": ["self"], **body}
    whole = server.post("/v1/completions", body).json()["choices"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = chunks_of(server.post("/v1/completions", {**body, "stream": True, "stream_options": options}))
    assert stream[-1]["choices"] == [] and stream[-1]["usage"]["completion_tokens"] > 0
    assert all("usage" in chunk for chunk in stream)
    for choice in whole:
        usages = [chunk["usage"] for chunk in stream[:-1] if chunk["choices"][0]["index"] == choice["index"]]
        assert [usage["completion_tokens"] for usage in usages][-1] == len(choice["logprobs"]["tokens"])
        assert usages == sorted(usages, key=lambda usage: usage["completion_tokens"])
        parts = [c for chunk in stream for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert [p["finish_reason"] for p in parts[:-1]] == [None] * (len(parts) - 1)
        for name in ("tokens", "text_offset", "token_logprobs"):
            joined = [one for part in parts for one in part["logprobs"][name]]
            assert joined == pytest.approx(choice["logprobs"][name]) if name == "token_logprobs" else joined


def test_echo_with_logprobs_scores_the_prompt(server: TestServer, llm: LLM) -> None:
    """What lm-eval's `local-completions` asks for: the prompt and exactly one generated token."""
    prompt = "def main(self):\n"
    [expected] = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=1))
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    [choice] = server.post("/v1/completions", body).json()["choices"]
    scores = choice["logprobs"]
    num_prompt = len(expected.prompt_token_ids)
    assert choice["text"] == prompt + expected.outputs[0].text
    assert len(scores["tokens"]) == len(scores["token_logprobs"]) == len(scores["text_offset"]) == num_prompt + 1
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert expected.prompt_logprobs is not None
    pairs = zip(expected.prompt_token_ids[1:], expected.prompt_logprobs[1:], strict=True)
    known = [entries[token].logprob for token, entries in pairs if entries]
    assert scores["token_logprobs"][1:num_prompt] == pytest.approx(known, abs=1e-4)
    assert all(
        max(top.values()) >= value
        for top, value in zip(scores["top_logprobs"][1:], scores["token_logprobs"][1:], strict=True)
    )
    assert "".join(scores["tokens"]) == choice["text"]


def test_an_echo_without_new_tokens(server: TestServer) -> None:
    body = {"prompt": "a = 1", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = server.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == "a = 1" and answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]


def test_chat_is_that_of_llm(server: TestServer, llm: LLM) -> None:
    messages = [
        {"role": "user", "content": "def f("},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "y"},
    ]
    expected = llm.chat(messages, SamplingParams(max_tokens=12, temperature=0)).outputs[0]
    body = {"messages": messages, **GREEDY, "logprobs": True, "top_logprobs": 2}
    answer = server.post("/v1/chat/completions", body).json()
    [choice] = answer["choices"]
    message = choice["message"]
    assert (message["role"], message["content"], choice["finish_reason"]) == ("assistant", expected.text, "length")
    assert message["reasoning"] is message["reasoning_content"] is None and message["tool_calls"] == []
    entries = choice["logprobs"]["content"]
    assert "".join(bytes(entry["bytes"]).decode() for entry in entries) == expected.text
    assert all(
        len(entry["top_logprobs"]) == 2
        and entry["top_logprobs"][0] == {k: entry[k] for k in ("token", "logprob", "bytes")}
        for entry in entries
    )
    stream = chunks_of(server.post("/v1/chat/completions", {**body, "stream": True}))
    assert stream[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream]
    assert "".join(deltas) == expected.text and stream[-1]["choices"][0]["finish_reason"] == "length"
    assert "system_fingerprint" in stream[-1] and not any("usage" in chunk for chunk in stream)


def test_chat_without_max_tokens_has_the_remaining_context(server: TestServer) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "temperature": 0}
    usage = server.post("/v1/chat/completions", body).json()["usage"]
    assert usage["total_tokens"] == 512


def test_embeddings_are_those_of_llm(server: TestServer, llm: LLM) -> None:
    expected = [one.embedding.numpy() for one in llm.embed(["import os", "x = 1"])]
    body = {"input": ["import os", "x = 1"], "model": NAME}
    data = server.post("/v1/embeddings", body).json()["data"]
    np.testing.assert_allclose([one["embedding"] for one in data], expected, atol=1e-4)
    short = server.post("/v1/embeddings", {**body, "dimensions": 8, "encoding_format": "base64"}).json()["data"]
    import base64

    vector = np.frombuffer(base64.b64decode(short[0]["embedding"]), "<f4")
    assert vector.shape == (8,) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    error_of(server.post("/v1/embeddings", {**body, "dimensions": 10**6}), 400)
    error_of(server.post("/v1/embeddings", {"input": [2**70]}), 400)


def test_models_version_tokens(server: TestServer) -> None:
    [card] = server.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == (NAME, str(MODEL), 512)
    assert server.get(f"/v1/models/{NAME}").json() == card
    assert error_of(server.get("/v1/models/gpt-4"), 404)["message"] == "The model `gpt-4` does not exist."
    assert server.get("/version").json().keys() == {"version"}
    for path in ("/livez", "/readyz", "/health", "/ping"):
        assert server.get(path).status_code == 200
    text = "été = '日本'  # ok"
    tokens = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) and tokens["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({}, "prompt", "Either prompt or prompt_embeds must be provided and non-empty."),
        ({"prompt": ""}, "prompt", "Either prompt"),
        ({"prompt": ["a", ""]}, "prompt", "Either prompt"),
        ({"prompt": [1, "a"]}, "prompt", "prompt[0] must be a text or a list of token ids"),
        ({"prompt": "a", "max_token": 3}, "max_token", "unknown field 'max_token'; did you mean 'max_tokens'?"),
        ({"prompt": "a", "guided_json": {}}, "guided_json", "its successor is 'structured_outputs'"),
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"prompt": "a", "max_tokens": "3"}, "max_tokens", "max_tokens: expected `int"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens must be an integer from 1"),
        ({"prompt": "a", "max_tokens": 600}, "max_tokens", "'max_tokens' or 'max_completion_tokens' is too large: 600"),
        ({"prompt": [7] * 600}, "prompt", "This model's maximum context length is 512 tokens."),
        ({"prompt": [10**6]}, "prompt", "prompt token 0 must be from 0 to 2047"),
        ({"prompt": [-1]}, "prompt", "prompt token 0 must be from 0 to 2047"),
        ({"prompt": [[5], [2**70]]}, "prompt", "prompt token 0 must be from 0 to 2047"),
        ({"prompt": "a", "stop_token_ids": [2048]}, "stop_token_ids", "from 0 to 2047"),
        ({"prompt": "a", "tenant": "t" * 200}, "tenant", "at most 128 characters"),
        (
            {"prompt": "a", "stream_options": {"include_usage": True}},
            "stream_options",
            "only be defined when `stream=True`",
        ),
        (
            {"prompt": "a", "stream": True, "stream_options": {"include_usag": True}},
            "stream_options",
            "unknown field 'include_usag'; did you mean 'include_usage'?",
        ),
        ({"prompt": "a", "logprobs": -2}, "logprobs", "`logprobs` must be a positive value."),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "greater than max allowed: 20"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop", "at most 4 strings"),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature must be a number from 0"),
        ({"prompt": "a", "cache_salt": "a/b"}, "cache_salt", "without @ /"),
        ({"prompt": "a", "deadline": -1}, "deadline", "above 0"),
    ],
)
def test_invalid_completions(server: TestServer, body: dict[str, Any], param: str, text: str) -> None:
    error = error_of(server.post("/v1/completions", body), 400)
    assert error["param"] == param and text.replace("`int", "int") in error["message"], error
    assert error["type"] == "BadRequestError"


USER = [{"role": "user", "content": "a"}]
UNIQUE = {"type": "json_schema", "name": "a", "schema": {"uniqueItems": True}}
LONG = "a" * 40_000


@pytest.mark.parametrize(
    ("path", "body", "param", "text"),
    [
        ("/v1/completions", {"prompt": LONG}, "prompt", "the text must have at most 32768 characters"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages", "the text must have"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages", "at least one token"),
        (
            "/v1/chat/completions",
            {"messages": USER, "response_format": {"type": "json_schema", "json_schema": UNIQUE}},
            "response_format",
            "response_format: the keyword 'uniqueItems'",
        ),
        ("/v1/responses", {"input": []}, "input", "input must have at least one message"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be"),
        ("/v1/responses", {"input": "a", "text": {"format": UNIQUE}}, "text", "text: the keyword 'uniqueItems'"),
        (
            "/v1/messages",
            {"messages": USER, "max_tokens": 1, "stop_sequences": [""]},
            "stop_sequences",
            "_sequences[0]",
        ),
        (
            "/v1/messages",
            {"messages": USER, "max_tokens": 1, "output_config": {"format": UNIQUE}},
            "output_config",
            "output_config: the keyword 'uniqueItems'",
        ),
        ("/v1/embeddings", {"input": ["a", ""]}, "input", "non-empty"),
    ],
)
def test_errors_name_fields_as_their_route_does(
    server: TestServer, path: str, body: dict[str, Any], param: str, text: str
) -> None:
    response = server.post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and text in error["message"], error


def test_a_stream_over_http_1_0_is_sent_as_a_whole(server: TestServer) -> None:
    """That version has no chunks."""
    host, port = server.url.removeprefix("http://").split(":")
    data = b'{"prompt": [7], "max_tokens": 3, "stream": true}'
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.0\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))
        head, _, body = b"".join(iter(lambda: raw.recv(65536), b"")).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head and b"content-length: %d" % len(body) in head
    assert body.endswith(b"data: [DONE]\n\n") and all(line.startswith(b"data: ") for line in body.split(b"\n\n")[:-1])


def test_invalid_chats_and_routes(server: TestServer) -> None:
    user = [{"role": "user", "content": "a"}]
    for body, text in (
        ({"messages": []}, "at least one message"),
        ({}, "messages is required"),
        ({"messages": user, "tools": [{"type": "function"}]}, "tools[0].function must be an object with a name"),
        ({"messages": user, "top_logprobs": 2}, "`logprobs` must be set to true"),
        ({"messages": user, "chat_template": "{{ 1 }}"}, "never from a request"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is supported"),
        ({"messages": ["a"]}, "list of {'role', 'content'} objects"),
    ):
        assert text in error_of(server.post("/v1/chat/completions", body), 400)["message"]
    error_of(server.post("/v1/completions", {"prompt": "a", "model": "other"}), 404)
    error_of(server.get("/v1/other"), 404)
    error_of(server.get("/v1/completions"), 405)
    for content in (
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b'{"prompt": "\\ud800"}',
        b'{"a":' * 3000,
        b'{"x": ' + b"[" * 90 + b"]" * 90 + b"}",
    ):
        error_of(server.http.post("/v1/completions", content=content), 400)


def test_ignored_fields_and_request_ids(server: TestServer) -> None:
    body = {
        "prompt": "a",
        "max_tokens": 1,
        "user": "me",
        "metadata": {"a": 1},
        "stop": None,
    }
    response = server.post("/v1/completions", body, headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-sagellm-ignored"] == "user, metadata"
    assert response.headers["x-request-id"] == "mine-1" and response.json()["id"] == "cmpl-mine-1"
    assert server.post("/v1/completions", body | {"request_id": "b"}).json()["id"] == "cmpl-b"
    hostile = server.post("/v1/completions", body, headers={"X-Request-Id": "a b"})
    assert hostile.headers["x-request-id"] != "a b"


def test_requests_with_one_id_at_the_same_time(server: TestServer) -> None:
    """A request id of a client must not mix up two answers."""
    import concurrent.futures

    def ask(prompt: str) -> str:
        text: str = server.post(
            "/v1/completions", {"prompt": prompt, "max_tokens": 30, "temperature": 0}, headers={"X-Request-Id": "same"}
        ).json()["choices"][0]["text"]
        return text

    alone = [ask("import "), ask("class ")]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, ["import ", "class "])) == alone


def test_metrics_count_what_was_served(server: TestServer) -> None:
    def value(name: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = (
        value("sagellm:generation_tokens_total"),
        value('sagellm:request_success_total{engine="0",finished_reason="length"'),
    )
    server.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 7, "ignore_eos": True})
    server.post("/v1/completions", {"prompt": []})
    after = (
        value("sagellm:generation_tokens_total"),
        value('sagellm:request_success_total{engine="0",finished_reason="length"'),
    )
    assert (after[0] - before[0], after[1] - before[1]) == (14, 2)
    assert value('http_requests_total{handler="/v1/completions",method="POST",status="4xx"') > 0
    assert value('sagellm:pd_mode{engine="0",mode="hybrid"') == 1
    assert value("sagellm:kv_blocks") > 0 and value("sagellm:num_requests_running") == 0
