"""Ends of streams: clients that go away, a lost engine, failed steps, a drain."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx2
import pytest
from servers import MODEL, ScriptedChannel, TestServer, engine_channel, running

from sageLLM import LLM
from sageLLM.runtime.engine.sequences import Sequence
from sageLLM.runtime.server.messages import StepFailed

BODY = {"prompt": [5, 6], "max_tokens": 100, "stream": True}


@contextlib.contextmanager
def scripted(**settings: object) -> Iterator[tuple[TestServer, list[ScriptedChannel]]]:
    """A server, and the channels of the engines that it has started, newest last."""
    channels: list[ScriptedChannel] = []

    def make() -> ScriptedChannel:
        channels.append(ScriptedChannel())
        return channels[-1]

    with running(make, **settings) as server:
        yield server, channels


def submitted(channel: ScriptedChannel) -> str:
    assert channel.arrived.acquire(timeout=30)
    return list(channel.submitted)[-1]


def lines_of(response: httpx2.Response) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in response.iter_lines() if line)


@pytest.mark.parametrize("has_token", [False, True])
def test_a_client_that_goes_away_aborts_its_request(has_token: bool) -> None:
    """Also before the first token, when no header of the response was sent."""
    with scripted() as (server, [channel]):
        connection = httpx2.Client(base_url=server.url, timeout=30, trust_env=False)
        name = ""

        def ask() -> None:
            with (
                contextlib.suppress(httpx2.TransportError),
                connection.stream("POST", "/v1/completions", json=BODY) as response,
            ):
                next(lines_of(response))

        if has_token:
            thread = threading.Thread(target=ask)
            thread.start()
            name = submitted(channel)
            channel.emit_tokens(name, [7])
            thread.join(30)  # the stream is closed after its first chunk
        else:
            import socket

            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as raw:
                data = json.dumps(BODY).encode()
                raw.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(data) + data
                )
                name = submitted(channel)
        assert channel.arrived.acquire(timeout=30)
        assert [one.request_id for one in channel.aborted] == [name]
        wait_until(lambda: not server.service.client.num_requests and not server.service.num_active)
        connection.close()
        assert (
            'request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 1.0'
            in server.get("/metrics").text
        )


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lost_engine_ends_streams_with_an_error_and_is_started_again() -> None:
    with scripted() as (server, channels):
        giver = threading.Thread(target=lambda: channels[0].emit_tokens(submitted(channels[0]), [7]))
        giver.start()
        with server.http.stream("POST", "/v1/completions", json=BODY) as response:
            lines = lines_of(response)
            assert "choices" in json.loads(next(lines))
            channels[0].lose()
            error = json.loads(next(lines))["error"]
            assert (error["code"], error["type"]) == (500, "InternalServerError")
            assert "killed by signal 9" in error["message"] and next(lines) == "[DONE]"
        giver.join(30)
        wait_until(lambda: len(channels) == 2 and server.service.client.state == "ready")
        done = []
        thread = threading.Thread(
            target=lambda: done.append(server.post("/v1/completions", {"prompt": [5], "max_tokens": 1}))
        )
        thread.start()
        channels[1].emit_tokens(submitted(channels[1]), [7], "length")
        thread.join(30)
        assert done[0].status_code == 200
        assert "engine_restarts_total" in server.get("/metrics").text


def test_requests_are_refused_while_the_engine_starts_again() -> None:
    with scripted() as (server, _):
        server.service.client.state = "lost"
        response = server.post("/v1/completions", {"prompt": [5]})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert server.get("/readyz").status_code == 503 and server.get("/livez").status_code == 200
        assert server.get("/v1/models").status_code == 200


def test_a_failed_step_and_a_failed_request_are_errors() -> None:
    with scripted() as (server, [channel]):
        answers: list[httpx2.Response] = []

        def ask() -> None:
            answers.append(server.post("/v1/completions", {"prompt": [5], "max_tokens": 9}))

        for event, code, text in (
            (lambda name: channel.emit(StepFailed([name], "a step failed")), 500, "a step failed"),
            (lambda name: channel.reject(name, "too long", "prompt"), 400, "too long"),
            (
                lambda name: channel.emit_tokens(name, [7], "abort", stop_reason="the logits are not finite"),
                500,
                "not finite",
            ),
        ):
            thread = threading.Thread(target=ask)
            thread.start()
            event(submitted(channel))
            thread.join(30)
            assert answers[-1].status_code == code and text in answers[-1].json()["error"]["message"]
        assert server.service.client.num_requests == 0 and server.service.admission.num_requests == 0


def test_a_stop_string_aborts_the_rest_of_the_answer() -> None:
    with scripted() as (server, [channel]):
        ids = server.post("/tokenize", {"prompt": "import os\nimport re"}).json()["tokens"]
        done: list[httpx2.Response] = []
        body = {"prompt": [5], "max_tokens": 50, "stop": "\n"}
        thread = threading.Thread(target=lambda: done.append(server.post("/v1/completions", body)))
        thread.start()
        name = submitted(channel)
        assert channel.submitted[name].params.stop_strings == ()
        channel.emit_tokens(name, ids)
        thread.join(30)
        [choice] = done[0].json()["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "\n") and "re" not in choice["text"]
        assert [one.request_id for one in channel.aborted] == [name]


def test_traits_reach_the_engine() -> None:
    with scripted() as (server, [channel]):
        traits = {"priority": -3, "deadline": 2.5, "tenant": "a", "cache_salt": "s"}
        thread = threading.Thread(
            target=lambda: server.post("/v1/completions", {"prompt": [5], "max_tokens": 1, **traits})
        )
        thread.start()
        name = submitted(channel)
        assert {field: getattr(channel.submitted[name], field) for field in traits} == traits
        channel.emit_tokens(name, [7], "length")
        thread.join(30)


def test_quiet_streams_have_comments() -> None:
    with (
        scripted(sse_keep_alive_interval=0.02) as (server, [channel]),
        server.http.stream("POST", "/v1/completions", json=BODY) as response,
    ):
        lines = (line for line in response.iter_lines() if line)
        name = submitted(channel)
        assert next(lines) == ": keep-alive"
        channel.emit_tokens(name, [7], "length")
        rest = [line for line in lines if not line.startswith(":")]
        assert len(rest) == 2 and rest[-1] == "data: [DONE]"


def test_a_failed_step_ends_the_requests_that_the_engine_has_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that waits in the queue before the engine, which is answered after it."""
    llm = LLM(MODEL, dtype="float32", skip_tokenizer=True)
    step = llm.engine.step_answers
    with running(lambda: engine_channel(llm)) as server, ThreadPoolExecutor(2) as threads:

        def fail() -> list[Sequence]:
            monkeypatch.setattr(llm.engine, "step_answers", step)
            second.append(threads.submit(server.post, "/v1/completions", {"prompt": [7], "max_tokens": 3}))
            while server.service.client.num_requests < 2:
                time.sleep(0.01)
            raise OSError("no space left")

        second: list[Future[httpx2.Response]] = []
        monkeypatch.setattr(llm.engine, "step_answers", fail)
        first = server.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 100})
        assert first.status_code == 500 and "no space left" in first.json()["error"]["message"]
        assert second[0].result(30).json()["usage"]["completion_tokens"] == 3
    assert not llm.engine.has_work
