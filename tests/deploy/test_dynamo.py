"""Requests and chunks of Dynamo's workers, and a smoke test with Dynamo's own frontend where it is installed."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.dynamo_worker import chunk_of, sampling_params, subscriber_address
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.server.messages import Delta

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
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    last = {"token_ids": [6], "index": 0, "finish_reason": "length", "completion_usage": usage}
    assert chunk_of(Delta("0", 0, [6], "length"), 3, 3) == last
    assert chunk_of(Delta("0", 0, [6], "abort"), 3, 3)["finish_reason"] == "cancelled"


def test_the_address_of_events_for_a_subscriber() -> None:
    assert subscriber_address("tcp://*:5557") == "tcp://127.0.0.1:5557"


@pytest.mark.skipif(DYNAMO is None, reason="SAGELLM_DYNAMO_PYTHON names no Python with ai-dynamo (docs/deploy.md)")
def test_a_worker_behind_the_frontend(tmp_path: Path) -> None:
    expected = LLM(MODEL).generate("def main(", SamplingParams(max_tokens=12, temperature=0))[0].outputs[0].text
    env = {**os.environ, "DYN_FILE_KV": str(tmp_path), "DYN_EVENT_PLANE": "zmq", "PYTHONPATH": str(ROOT / "_dev")}
    worker = ["-m", "sageLLM.runtime.cli.entry", "dynamo-worker", str(MODEL), "--served-model-name", "tiny"]
    frontend = ["-m", "dynamo.frontend", "--http-port", "8123", "--discovery-backend", "file"]
    processes = [subprocess.Popen([DYNAMO or sys.executable, *one], env=env) for one in (worker, frontend)]
    body = {"model": "tiny", "prompt": "def main(", "max_tokens": 12, "temperature": 0}
    try:
        answer = asked("http://127.0.0.1:8123", body)
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["completion_tokens"] == 12
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


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
