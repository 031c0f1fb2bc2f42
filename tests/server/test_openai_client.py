"""The `openai` client works unchanged: synchronous, asynchronous, streams, errors, retries."""

from __future__ import annotations

import asyncio

import openai
import pytest
from servers import NAME, ScriptedChannel, TestServer, running

MESSAGES = [{"role": "user", "content": "def main("}]


@pytest.fixture
def client(server: TestServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_synchronous_calls(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=8, temperature=0)  # type: ignore[arg-type]
    assert chat.choices[0].finish_reason == "length" and chat.usage is not None and chat.usage.completion_tokens == 8
    text = client.completions.create(model=NAME, prompt="import os", max_tokens=8, temperature=0, logprobs=1)
    assert text.choices[0].logprobs is not None and len(text.choices[0].logprobs.tokens or []) == 8
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    vectors = client.embeddings.create(model=NAME, input=["a", "b"]).data  # the client asks for base64
    assert len(vectors) == 2 and isinstance(vectors[0].embedding[0], float)
    raw = client.with_raw_response.completions.create(model=NAME, prompt="a", max_tokens=1)
    assert raw.headers["x-request-id"]


def test_streams(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},  # type: ignore[arg-type]
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.total_tokens == whole.usage.total_tokens  # type: ignore[union-attr]


def test_responses(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    options = {"model": NAME, "input": MESSAGES, "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**options)  # type: ignore[call-overload]
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.usage.total_tokens == chat.usage.total_tokens  # type: ignore[union-attr]
    events = list(client.responses.create(**options, stream=True))  # type: ignore[call-overload]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = "output_text.delta"
    assert [kind for kind in kinds if kind != deltas] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert "".join(event.delta for event in events if event.type.endswith(deltas)) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    for bad, text in (
        ({"previous_response_id": "resp_1"}, "keeps no responses"),
        ({"input": [{"type": "function_call_output"}]}, "call_id must be a text"),
    ):
        with pytest.raises(openai.BadRequestError, match=text):
            client.responses.create(**{**options, **bad})  # type: ignore[call-overload]


def test_asynchronous_streams_at_the_same_time(server: TestServer) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def ask(prompt: str) -> str:
                stream = await client.completions.create(
                    model=NAME, prompt=prompt, max_tokens=16, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            alone = [await ask("import "), await ask("class ")]
            together = list(await asyncio.gather(ask("import "), ask("class ")))
            assert alone == together
            return alone

    assert all(asyncio.run(main()))


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'max_tokens'") as bad:
        client.completions.create(model=NAME, prompt="a", extra_body={"max_token": 3})
    assert (bad.value.type, bad.value.param, bad.value.code) == ("BadRequestError", "max_token", "400")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="a")


def test_a_refusal_is_a_rate_limit_and_an_error_in_a_stream_raises() -> None:
    import threading

    channel = ScriptedChannel()
    with running(lambda: channel, max_num_queued_reqs=1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        failures: list[Exception] = []

        def read() -> None:
            try:
                list(client.completions.create(model=NAME, prompt=[5], stream=True))
            except openai.APIError as error:
                failures.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        assert channel.arrived.acquire(timeout=30)
        with pytest.raises(openai.RateLimitError, match="retry in 1 s"):
            client.completions.create(model=NAME, prompt="a")
        [name] = channel.submitted
        channel.emit_tokens(name, [7])
        channel.emit_tokens(name, [8], "abort", stop_reason="the logits are not finite")
        thread.join(30)
        assert "not finite" in str(failures[0])
