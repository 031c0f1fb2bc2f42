"""`sagellm simulate`: its table, its JSON, and its error messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sageLLM.runtime.cli.main import app

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SYNTHETIC = ("--rate", "100", "--num-requests", "24", "--prompt", "200", "400", "--output", "20", "40")


def simulate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_a_table_with_a_line_per_mode_and_a_verdict(model: str) -> None:
    done = simulate("--model", model, *SYNTHETIC)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("mode        TTFT ms p50/p90/p99  TPOT ms p50/p90/p99")
    assert [line.split()[0] for line in lines[1:6]] == ["strict", "time_share", "hybrid", "vllm", "auto"]
    assert lines[7].startswith("Best for TTFT <= 1000 ms and TPOT <= 100 ms: ")
    assert lines[8].startswith("Disaggregation ")


def figures(model: str, *arguments: str) -> dict[str, Any]:
    done = simulate("--model", model, *SYNTHETIC, "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def test_json_is_the_same_every_time_and_follows_the_seed(model: str) -> None:
    first = figures(model, "--mode", "hybrid", "--mode", "strict")
    assert list(first["modes"]) == ["strict", "hybrid"]
    assert first["modes"]["hybrid"]["num_finished"] == 24
    assert first == figures(model, "--mode", "hybrid", "--mode", "strict")
    assert first != figures(model, "--mode", "hybrid", "--mode", "strict", "--seed", "1")


def test_two_devices_for_a_worker_are_faster_than_one(model: str) -> None:
    one, two = (figures(model, "--mode", "hybrid", "--tp", tp)["modes"]["hybrid"] for tp in ("1", "2"))
    assert two["mean_tpot"] < one["mean_tpot"] < 2 * two["mean_tpot"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "pass --trace, or --rate and --num-requests to generate one"),
        ((*SYNTHETIC, "--mode", "both"), "--mode must be one of strict, time_share, hybrid, vllm, auto, got both"),
        (
            (*SYNTHETIC, "--mode", "strict", "--decode-workers", "0"),
            "strict mode requires at least one decode worker, got --decode-workers 0",
        ),
        ((*SYNTHETIC, "--hardware", "abacus"), "--hardware must be one of a100, cpu, h100, got abacus"),
        (("--trace", "gone.csv"), "[Errno 2] No such file or directory: 'gone.csv'"),
    ],
)
def test_an_error_names_the_rule_and_the_value(model: str, arguments: tuple[str, ...], message: str) -> None:
    done = simulate("--model", model, *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}")


def test_one_worker_serves_in_every_mode_but_strict(model: str) -> None:
    one = figures(model, "--decode-workers", "0")["modes"]
    assert list(one) == ["time_share", "hybrid", "vllm", "auto"]
    assert one["hybrid"]["mean_tpot"] > figures(model, "--mode", "hybrid")["modes"]["hybrid"]["mean_tpot"]


def test_weights_that_do_not_fit_are_an_error(model: str, tmp_path: Path) -> None:
    huge = tmp_path / "config.json"
    huge.write_text(json.dumps(CONFIG | {"intermediate_size": 2**20}))
    done = simulate("--model", str(huge), *SYNTHETIC)
    assert done.stderr == f"error: {huge}: 105.5 GB of weights do not fit h100; raise --tp\n"


def test_pairs_of_lengths_require_a_rate(model: str, tmp_path: Path) -> None:
    pairs = tmp_path / "lengths.json"
    pairs.write_text("[[100, 10], [200, 20]]")
    assert simulate("--model", model, "--trace", str(pairs)).stderr == (
        f"error: expected arrival times in {pairs}; pass --rate\n"
    )
    assert simulate("--model", model, "--trace", str(pairs), "--rate", "3").exit_code == 0
