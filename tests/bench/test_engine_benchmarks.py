"""Tests of `sagellm bench throughput`, `latency` and `steps`."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.bench import steps
from sageLLM.runtime.bench.steps import StepError, StepTimer, as_table
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.errors import SageError

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"


def bench(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", command, "--model", str(MODEL), *arguments])


def test_throughput_has_the_keys_and_lines_of_vllm(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    done = bench("throughput", "--num-prompts", "3", "--input-len", "9", "--output-len", "4", "--output-json", str(out))
    assert done.exit_code == 0, done.stderr
    data = json.loads(out.read_text())
    assert [*data] == ["elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"]
    assert (data["num_requests"], data["total_num_tokens"]) == (3, 3 * 13)
    assert data["tokens_per_second"] == pytest.approx(39 / data["elapsed_time"])
    first, *rest = done.stdout.splitlines()
    assert first.startswith("Throughput: ") and first.endswith(" output tokens/s")
    assert rest == ["Total num prompt tokens:  27", "Total num output tokens:  12"]


def test_latency_has_the_keys_and_lines_of_vllm() -> None:
    arguments = ["--batch-size", "2", "--input-len", "5", "--output-len", "3", "--num-iters-warmup", "1", "--num-iters"]
    done = bench("latency", *arguments, "4", "--json")
    data = json.loads(done.stdout)
    assert [*data] == ["avg_latency", "latencies", "percentiles"]
    assert len(data["latencies"]) == 4 and [*data["percentiles"]] == ["10", "25", "50", "75", "90", "99"]
    assert min(data["latencies"]) <= data["percentiles"]["50"] <= max(data["latencies"])
    lines = bench("latency", *arguments, "1").stdout.splitlines()
    assert lines[0].startswith("Avg latency: ") and lines[-1].startswith("99% percentile latency: ")


def test_prompts_that_do_not_fit_are_an_error() -> None:
    done = bench("latency", "--input-len", "400", "--output-len", "200")
    assert done.exit_code == 1
    assert done.stderr == "error: input_len + output_len must be at most max_model_len=512, got 400 + 200\n"


def test_steps_are_timed_and_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CHUNK", 64), ("CONTEXT", 32), ("NUM_DECODES", 4), ("NUM_STEPS", 6), ("PROMPTS", (32, 128))):
        monkeypatch.setattr(steps, name, value)
    done = bench("steps", "--rounds", "1", "--json")
    assert done.exit_code == 0, done.stderr
    found = {one["step"]: one for one in json.loads(done.stdout)}
    assert [*found] == [
        "decode, 1 at 32",
        "decode, 4 at 32",
        "prefill of 32",
        "prefill of 128",
        "4 decodes + chunk of 64",
    ]
    for one in found.values():
        assert one["least_ms"] <= one["measured_ms"] <= one["most_ms"] and one["predicted_ms"] > 0
        assert one["error"] == pytest.approx(one["predicted_ms"] / one["measured_ms"] - 1, abs=0.02)
    assert found["prefill of 128"]["predicted_ms"] > found["prefill of 32"]["predicted_ms"]
    assert "+100%" in as_table([StepError("one", 0.001, 0.001, 0.002, 0.002)])


def test_a_model_that_is_too_short_is_refused() -> None:
    with pytest.raises(SageError, match="max_model_len must be at least 1072 to time steps, got 512"):
        StepTimer(MODEL, HARDWARE["cpu"])
