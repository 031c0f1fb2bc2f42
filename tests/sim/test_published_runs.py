"""`sagellm simulate` against runs of real engines and published figures, by the commands of docs/simulate.md."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sageLLM.runtime.cli.main import app

RUN = "serving_timelines/RTXPRO6000_Llama-3.1-8B"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
ONE_WORKER = ("--mode", "vllm", "--decode-workers", "0", "--max-prefill-tokens", "2048")
PRO_6000 = ("--hardware", "rtx_pro_6000", "--max-batch-size", "128")


def simulate(*arguments: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["simulate", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


@pytest.fixture(scope="module")
def clone(data: Path) -> Path:
    """A clone of casys-kaist/LLMServingSim, which has more profiles and runs."""
    folder = data / "LLMServingSim"
    if not folder.is_dir():
        pytest.skip(f"no clone of LLMServingSim in {data}")
    return folder


def config_of(clone: Path, model: str) -> Path:
    return clone / "configs" / "model" / f"{model}.json"


def profile_of(clone: Path, hardware: str, model: str) -> Path:
    return clone / "profiler" / "perf" / hardware / model / "bf16"


def run_of(clone: Path, hardware: str, model: str) -> Path:
    return clone / "bench" / "examples" / hardware / model.split("/")[1] / "vllm" / "requests.jsonl"


def check(errors: dict[str, float], limit: float, *unchecked: str) -> None:
    assert {name: error for name, error in errors.items() if abs(error) > limit and name not in unchecked} == {}


def test_a_measured_profile_on_one_device(data: Path, llama_8b: Path) -> None:
    """With the time of vLLM's scheduler, 7.2 us per request (1,840 us at 256 requests, from a separate measurement)."""
    args = ("--profile", data / RUN, "--model", llama_8b, "--trace", data / RUN / "requests.jsonl", "--compare")
    errors = simulate(*args, *ONE_WORKER, *PRO_6000, "--request-overhead-us", "7.2")["errors"]["vllm"]
    check(errors, 0.03, "ttft_p50")
    assert abs(errors["ttft_p50"]) < 0.09, "half of the requests wait, for seconds"
    check(simulate(*args, *ONE_WORKER, *PRO_6000)["errors"]["vllm"], 0.08, "ttft_p50")


def test_the_roofline_of_the_same_device(data: Path, llama_8b: Path) -> None:
    """The entry's efficiencies are fitted to kernels, not to this run; vLLM has no epilogues."""
    args = ("--model", llama_8b, "--trace", data / RUN / "requests.jsonl", "--compare", "--no-fusion")
    errors = simulate(*args, *ONE_WORKER, *PRO_6000, "--request-overhead-us", "7.2")["errors"]["vllm"]
    check(errors, 0.04, "ttft_p50")
    assert abs(errors["ttft_p50"]) < 0.07


def test_the_roofline_of_other_runs(clone: Path) -> None:
    model = "Qwen/Qwen3-32B"
    args = ("--model", config_of(clone, model), "--tp", "2", "--no-fusion", "--request-overhead-us", "7.2")
    run = ("--trace", run_of(clone, "RTXPRO6000", model), "--compare")
    check(simulate(*args, *run, *ONE_WORKER, *PRO_6000)["errors"]["vllm"], 0.04)
    model = "meta-llama/Llama-3.1-8B"
    args = ("--model", config_of(clone, model), "--no-fusion", "--request-overhead-us", "7.2", "--num-blocks", "2587")
    run = ("--trace", run_of(clone, "RTX4090", model), "--compare", "--hardware", "rtx_4090")
    check(simulate(*args, *run, *ONE_WORKER)["errors"]["vllm"], 0.05)


def test_a_card_with_a_full_kv_cache(clone: Path) -> None:
    """vLLM reported 2588 blocks, of which it keeps one."""
    model = "meta-llama/Llama-3.1-8B"
    args = ("--profile", profile_of(clone, "RTX4090", model), "--model", config_of(clone, model))
    args = (*args, "--trace", run_of(clone, "RTX4090", model), "--compare", *ONE_WORKER, "--num-blocks", "2587")
    check(simulate(*args)["errors"]["vllm"], 0.02)
    no_gate = simulate(*args, "--no-full-sequence-gate", "--no-prefix-caching")["errors"]["vllm"]
    assert no_gate["throughput"] < -0.04, "the defaults matter here"


def test_two_devices(clone: Path) -> None:
    """The bandwidth of the entry's link is fitted to this run, so only the spread over the metrics is a result."""
    model = "Qwen/Qwen3-32B"
    args = ("--profile", profile_of(clone, "RTXPRO6000", model), "--model", config_of(clone, model), "--tp", "2")
    args = (*args, "--trace", run_of(clone, "RTXPRO6000", model), "--compare", *ONE_WORKER, *PRO_6000)
    check(simulate(*args, "--request-overhead-us", "7.2")["errors"]["vllm"], 0.03)


@pytest.mark.parametrize("is_profile", [True, False], ids=["profile", "roofline"])
def test_experts_on_two_workers(clone: Path, is_profile: bool) -> None:
    """Data parallelism of 2 with the experts on both.

    The median TTFT is that of requests that do not wait for a place in the batch, the mean that of a few that do.
    """
    model = "Qwen/Qwen3-30B-A3B-Instruct-2507"
    args = (
        "--model",
        config_of(clone, model),
        "--ep",
        "2",
        "--mode",
        "vllm",
        "--max-prefill-tokens",
        "2048",
        *PRO_6000,
    )
    run = ("--trace", run_of(clone, "RTXPRO6000", model), "--compare")
    cost = ("--profile", profile_of(clone, "RTXPRO6000", model)) if is_profile else ("--no-fusion",)
    errors = simulate(*args, *run, *cost)["errors"]["vllm"]
    if is_profile:
        check(errors, 0.05)
    else:
        check(errors, 0.02, "ttft_mean", "ttft_p50", "ttft_p99")
        check(errors, 0.11)
    unplanned = simulate(*args, *run, *cost, "--no-async-scheduling")["errors"]["vllm"]
    assert unplanned["ttft_p50"] < -0.2, "vLLM plans ahead: most requests here wait for a step and for the next one"


DISTSERVE = ("--model", "facebook/opt-13b", "--max-batch-size", "10000000", "--max-decode-context", "50000")
SLO = ("--slo-ttft", "0.25", "--slo-tpot", "0.1")


@pytest.mark.parametrize(
    ("rate", "mode", "profile", "arguments", "theirs"),
    [
        (3.0, "strict", "distserve", ("--prefill-tp", "2", "--max-prefill-tokens", "163008"), 99.7),
        (4.5, "strict", "distserve", ("--prefill-tp", "2", "--max-prefill-tokens", "163008"), 48.7),
        (1.5, "prefill_first", "vllm", ("--decode-workers", "0", "--max-prefill-tokens", "66144"), 85.3),
        (2.0, "prefill_first", "vllm", ("--decode-workers", "0", "--max-prefill-tokens", "66144"), 77.0),
    ],
)
def test_distserves_rows(
    data: Path, tmp_path: Path, rate: float, mode: str, profile: str, arguments: tuple[str, ...], theirs: float
) -> None:
    """DistServe decodes as many tokens as the answer has after the first token, so an answer is one token longer.

    It plans no step ahead.
    """
    pairs = json.loads((data / "distserve" / "distserve_sim_lengths_300.json").read_text())
    trace = tmp_path / "lengths.json"
    trace.write_text(json.dumps([[prompt, output + 1] for prompt, output in pairs]))
    table = data / "distserve" / f"profiler-a100-80g.{profile}.json"
    args = ("--profile", table, "--trace", trace, "--rate", str(rate), "--mode", mode, *DISTSERVE, *SLO, *arguments)
    args = (*args, "--no-async-scheduling")
    assert 100 * simulate(*args)["modes"][mode]["attainment"] == pytest.approx(theirs, abs=100 / 300 + 0.05)
