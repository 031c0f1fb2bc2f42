"""`sagellm serve` as a process: a killed engine, and SIGTERM under load."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from servers import MODEL
from typer.testing import CliRunner

from sageLLM.runtime.cli.main import app
from sageLLM.runtime.cli.status import read_metrics, status_lines

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the engine process in /proc")


WORKERS = ("--pd", "strict", "--prefill-workers", "2", "--decode-workers", "1")
KEYS = ("--api-key", "user", "--admin-api-key", "admin")


class ServeProcess:
    """A running `sagellm serve` with its output."""

    def __init__(self, *options: str, model: Path = MODEL) -> None:
        command = [sys.executable, "-m", "sageLLM.runtime.cli.entry", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self.is_serving = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.is_serving.wait(120), self.text
        found = re.search(r"serving \S+ at (http://\S+)/v1", self.text)
        assert found, self.text
        self.url, self.model = found[1], str(model)
        headers = {"Authorization": "Bearer user"}
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("  curl "):
                self.is_serving.set()
        self.is_serving.set()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    @property
    def engine_id(self) -> int:
        """The newest child process with the engine's module."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        engines = [int(one) for one in children if b"serve_engine" in Path(f"/proc/{one}/cmdline").read_bytes()]
        return engines[-1]

    def stream(self, num_tokens: int, prompt: str = "def main(") -> list[str]:
        body = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            return [line.removeprefix("data: ") for line in response.iter_lines() if line]


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    found = ServeProcess("--log-format", "json", *WORKERS, *KEYS)
    yield found
    if found.process.poll() is None:  # a test has failed, perhaps with a stopped engine, which does not see its end
        os.kill(found.engine_id, signal.SIGKILL)
        found.process.kill()
    found.process.wait()


def wait_until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_engine(server: ServeProcess) -> None:
    """Every stream gets an error object, /readyz turns, the engine starts again, and the next request works."""
    answer = server.stream(8)
    assert answer[-1] == "[DONE]"
    killed = server.engine_id
    os.kill(killed, signal.SIGSTOP)  # so that no stream ends before the engine does
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        posts = [
            pool.submit(server.http.post, "/v1/completions", json={"prompt": "a", "max_tokens": 400}) for _ in range(4)
        ]
        wait_until(lambda: queued(server) == 4)
        os.kill(killed, signal.SIGKILL)
        for post in posts:
            error = post.result().json()["error"]
            assert (post.result().status_code, "killed by signal 9" in error["message"]) == (500, True)
    assert server.http.get("/livez").status_code == 200
    wait_until(lambda: server.http.get("/readyz").status_code == 200)
    assert server.engine_id != killed
    assert workers_of(server) == [
        "worker 0: prefill  running",
        "worker 1: prefill  running",
        "worker 2: decode   running",
    ]
    assert text_of(server.stream(8)) == text_of(answer)


def workers_of(server: ServeProcess) -> list[str]:
    """The lines of workers that `sagellm status` prints, up to the state."""
    wait_until(lambda: len(status_lines(read_metrics(server.url, None))) > 2)
    return [line[:26].strip() for line in status_lines(read_metrics(server.url, None))[2:]]


def test_a_worker_changes_its_role_while_streams_run(server: ServeProcess) -> None:
    """By an administrator: to decode, and back before it has drained or after; the streams do not notice."""
    prompts = [f"def f{index}(" for index in range(12)]
    expected = [text_of(server.stream(24, prompt)) for prompt in prompts]
    for role in ("decode", "prefill"):
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            streams = [pool.submit(server.stream, 24, prompt) for prompt in prompts]
            done = CliRunner().invoke(app, ["set-role", "1", role, "--url", server.url, "--api-key", "admin"])
            assert done.exit_code == 0 and done.stdout.startswith("worker 1 is "), done.output
            assert [text_of(stream.result()) for stream in streams] == expected
        wait_until(lambda role=role: f"worker 1: {role:<8} running" in workers_of(server))


@pytest.mark.parametrize(
    ("key", "worker", "role", "text"),
    [
        ("admin", "2", "prefill", "worker 2 must keep its role: it is the only decode worker"),
        ("admin", "3", "prefill", "the workers are 0 to 2, got 3"),
        ("user", "1", "decode", "HTTP 401: the API key is missing or wrong"),
    ],
)
def test_a_role_that_stays(server: ServeProcess, key: str, worker: str, role: str, text: str) -> None:
    done = CliRunner().invoke(app, ["set-role", worker, role, "--url", server.url, "--api-key", key])
    assert done.exit_code == 1 and text in done.stderr, done.output
    assert not done.stdout


def text_of(lines: list[str]) -> str:
    """The text of a stream; the tokens of two steps may be in one chunk."""
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


def queued(server: ServeProcess) -> float:
    [value] = re.findall(r"num_requests_queued\{\S+ (\S+)", server.http.get("/metrics").text)
    return float(value)


def test_sigterm_lets_admitted_streams_finish(server: ServeProcess) -> None:
    num_streams, num_tokens = 6, 50
    os.kill(server.engine_id, signal.SIGSTOP)  # so that no stream ends before the signal
    with concurrent.futures.ThreadPoolExecutor(num_streams) as pool:
        streams = [pool.submit(server.stream, num_tokens, f"x{index} = ") for index in range(num_streams)]
        wait_until(lambda: queued(server) == num_streams)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.http.get("/readyz").status_code == 503)
        refused = server.http.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        os.kill(server.engine_id, signal.SIGCONT)
        answers = [stream.result() for stream in streams]
    for lines in answers:
        assert lines[-1] == "[DONE]" and json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0, server.text
    logged = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert any(entry["message"].startswith("SIGTERM: no new requests") for entry in logged)
