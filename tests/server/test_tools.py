"""`sagellm bench serve`, `sagellm chat` and `sagellm doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from servers import NAME, ScriptedChannel, TestServer, running
from typer.testing import CliRunner

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.server.load import LoadPlan, Outcome
from sageLLM.runtime.server.report import Report


def sagellm(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=input)


def test_the_figures_of_a_report() -> None:
    outcomes = [
        Outcome(start=10.0, ttft=0.1, latency=0.4, itls=[0.1, 0.2], prompt_len=5, output_len=3),
        Outcome(start=10.5, ttft=0.3, latency=1.3, itls=[1.0], prompt_len=7, output_len=2),
        Outcome(start=10.6, error="HttpError: refused"),
    ]
    data = Report(outcomes=outcomes, duration=2.0, setup={"request_rate": "inf"}, percentiles=[50, 99]).as_data()
    assert (data["completed"], data["failed"]) == (2, 1)
    assert (data["total_input_tokens"], data["total_output_tokens"]) == (12, 5)
    assert (data["request_throughput"], data["output_throughput"], data["total_token_throughput"]) == (1.0, 2.5, 8.5)
    assert data["mean_ttft_ms"] == pytest.approx(200) and data["median_tpot_ms"] == pytest.approx((150 + 1000) / 2)
    assert data["p50_itl_ms"] == pytest.approx(200) and data["max_concurrent_requests"] == 2
    assert data["max_output_tokens_per_s"] == 4  # three of the first request, and one of the second at 10.8


def test_arrivals_have_the_rate() -> None:
    import asyncio
    import random

    from sageLLM.runtime.server import load

    plan = LoadPlan(prompts=["a"] * 400, output_len=1, model="m", request_rate=1e6, seed=3)

    async def main() -> int:
        return len([prompt async for prompt in load.arrivals(plan)])

    assert asyncio.run(main()) == 400
    draw = random.Random(3)
    assert sum(draw.gammavariate(1.0, 0.5) for _ in range(2000)) / 2000 == pytest.approx(0.5, rel=0.1)


def test_bench_serve(server: TestServer, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ["--base-url", server.url, "--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "5"]
    done = sagellm(
        "bench", "serve", *options, "--result-filename", str(path), "--save-detailed", "--max-concurrency", "3"
    )
    assert done.exit_code == 0, done.output
    for line in (" Serving Benchmark Result ", "Successful requests:", "Total generated tokens:", "P99 TTFT (ms):"):
        assert line in done.stdout
    data = json.loads(path.read_text())
    assert (data["completed"], data["failed"], data["total_output_tokens"], data["total_input_tokens"]) == (
        6,
        0,
        30,
        48,
    )
    assert data["model_id"] == NAME and len(data["ttfts"]) == 6 and all(ttft > 0 for ttft in data["ttfts"])
    chat = sagellm("bench", "serve", *options, "--backend", "openai-chat", "--json")
    assert chat.exit_code == 0 and json.loads(chat.stdout)["total_output_tokens"] == 30


def test_bench_serve_reports_failures(server: TestServer) -> None:
    done = sagellm("bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--random-input-len", "600")
    assert done.exit_code == 1 and "maximum context length" in done.stderr
    assert "Failed requests:                         2" in done.stdout
    gone = sagellm("bench", "serve", "--base-url", "http://127.0.0.1:1")
    assert gone.exit_code == 1 and gone.stderr.startswith("error: ")


def test_a_conversation(server: TestServer, llm: LLM) -> None:
    options = ["chat", "--url", server.url, "--temperature", "0", "--max-tokens", "8"]
    params = SamplingParams(max_tokens=8, temperature=0)
    first = [{"role": "user", "content": "def f("}]
    answer = llm.chat(first, params).outputs[0].text
    second = llm.chat([*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "x"}], params)
    done = sagellm(*options, input="def f(\nx\n/clear\ndef f(\n/quit\n")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{answer}\n{second.outputs[0].text}\n{answer}\n"
    assert sagellm(*options, "--quick", "def f(").stdout == f"{answer}\n"
    assert sagellm("chat", "--url", "http://127.0.0.1:1", "--quick", "a").exit_code == 1


def test_doctor(server: TestServer) -> None:
    done = sagellm("doctor", "--url", server.url, "--json")
    assert done.exit_code == 0, done.output
    findings = {one["topic"]: one for one in json.loads(done.stdout)}
    assert findings["server"]["text"].endswith(f"serves {NAME}") and findings["torch"]["level"] == "ok"
    assert "uvicorn" in findings["serve"]["text"]
    bad = sagellm("doctor", "--model", "no/such/folder", "--url", "http://127.0.0.1:1")
    assert bad.exit_code == 1 and [line.split()[1] for line in bad.stdout.splitlines() if line.startswith("error")] == [
        "model",
        "server",
    ]


def test_a_stream_that_is_cut_is_an_error() -> None:
    """Not a short answer that looks complete."""
    import asyncio
    import threading

    from sageLLM.runtime.server.http_client import Address
    from sageLLM.runtime.server.load import measure

    channel = ScriptedChannel()
    with running(lambda: channel) as server:

        def lose() -> None:
            assert channel.arrived.acquire(timeout=30)
            channel.emit_tokens(next(iter(channel.submitted)), [7])
            channel.lose()

        thread = threading.Thread(target=lose)
        thread.start()
        plan = LoadPlan(prompts=[[5]], output_len=9, model=NAME)
        outcome = asyncio.run(measure(plan, [5], Address.of(server.url)))
        thread.join(30)
    assert "killed by signal 9" in outcome.error
