"""Requests and chunks of Dynamo's workers, and a smoke test with Dynamo's own frontend where it is installed."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.dynamo_requests import chunk_of, sampling_params, submission, subscriber_address
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.server.messages import Delta, Submit

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny_python_model"
DYNAMO = os.environ.get("SAGELLM_DYNAMO_PYTHON")
"""A Python with ai-dynamo and the dependencies of this package."""


def test_parameters_of_a_request() -> None:
    asked = {
        "token_ids": [1],
        "sampling_options": {
            "temperature": 0.5,
            "top_k": 3,
            "n": 1,
            "best_of": 1,
            "seed": None,
            "use_beam_search": False,
        },
        "stop_conditions": {"max_tokens": 7, "stop_token_ids_hidden": [5], "ignore_eos": False},
        "eos_token_ids": [2],
    }
    assert sampling_params(asked) == SamplingParams(temperature=0.5, top_k=3, max_tokens=7, stop_token_ids=[5, 2])
    ignoring = asked | {"stop_conditions": {"max_tokens": 7, "ignore_eos": True}}
    assert sampling_params(ignoring) == SamplingParams(temperature=0.5, top_k=3, max_tokens=7, ignore_eos=True)


@pytest.mark.parametrize("options", [{"n": 2}, {"guided_decoding": {"json": {}}}])
def test_parameters_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SageError, match=r"n must be 1, got 2|guided_decoding is not available"):
        sampling_params({"token_ids": [1], "sampling_options": options})


def test_chunks() -> None:
    assert chunk_of(Delta("0", 0, [4, 5]), 3, 2) == {"token_ids": [4, 5], "index": 0}
    usage: dict[str, Any] = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    usage["prompt_tokens_details"] = {"cached_tokens": 2}
    last = {"token_ids": [6], "index": 0, "finish_reason": "length", "completion_usage": usage}
    assert chunk_of(Delta("0", 0, [6], "length"), 3, 3, 2) == last
    assert chunk_of(Delta("0", 0, [6], "abort"), 3, 3)["finish_reason"] == "cancelled"


def test_the_address_of_events_for_a_subscriber() -> None:
    assert subscriber_address("tcp://*:5557") == "tcp://127.0.0.1:5557"


def test_what_workers_of_the_modes_submit() -> None:
    asked = {"token_ids": [1, 2], "stop_conditions": {"max_tokens": 7, "min_tokens": 3}}
    assert submission("0", asked, "prefill").params == SamplingParams(max_tokens=1)
    handed_over = asked | {"prefill_result": {"disaggregated_params": {"kv_ticket": "here"}}}
    assert submission("0", handed_over, "decode") == Submit("0", [1, 2], sampling_params(asked), kv_ticket="here")
    for one in (asked, asked | {"prefill_result": None}, asked | {"prefill_result": {"disaggregated_params": None}}):
        assert submission("0", one, "decode") == Submit("0", [1, 2], sampling_params(asked))
    assert submission("0", handed_over, "agg").kv_ticket == ""
    last = chunk_of(Delta("0", 0, [6], "length", kv_ticket="here"), 3, 1)
    assert last["disaggregated_params"] == {"kv_ticket": "here"}


MODES = [["agg"], ["prefill", "decode"]]


@pytest.mark.skipif(DYNAMO is None, reason="SAGELLM_DYNAMO_PYTHON names no Python with ai-dynamo (docs/deploy.md)")
@pytest.mark.parametrize("modes", MODES, ids=str)
def test_workers_behind_the_frontend(tmp_path: Path, modes: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    prompt = "def main(arguments):\n    first, second = arguments\n    return first + second\n\n\n"
    expected = LLM(MODEL).generate(prompt, SamplingParams(max_tokens=12, temperature=0))[0].outputs[0].text
    env = {**os.environ, "DYN_FILE_KV": str(tmp_path), "DYN_EVENT_PLANE": "zmq", "PYTHONPATH": str(ROOT / "_dev")}
    env["SAGELLM_KEY"] = "a key of the test"
    worker = ["-m", "sageLLM.runtime.cli.entry", "dynamo-worker", str(MODEL), "--served-model-name", "tiny"]
    commands = [[*worker, "--disaggregation-mode", mode, "--component", f"{mode}_worker"] for mode in modes]
    address = ["--http-host", "127.0.0.1", "--http-port", str(port)]
    commands.append(["-m", "dynamo.frontend", *address, "--discovery-backend", "file"])
    processes = [subprocess.Popen([DYNAMO or sys.executable, *one], env=env) for one in commands]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    try:
        answer = asked(f"http://127.0.0.1:{port}", body)
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["completion_tokens"] == 12
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached >= 16) == ("decode" in modes), "the decode worker has the KV of the prefill worker"
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def asked(url: str, body: dict[str, Any], seconds: float = 200.0) -> dict[str, Any]:
    """The answer to a completion, as soon as the frontend knows the worker."""
    deadline = time.monotonic() + seconds
    while True:
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
        request.add_header("content-type", "application/json")
        try:
            found: dict[str, Any] = json.loads(urllib.request.urlopen(request, timeout=30).read())
            return found
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
