"""`sagellm simulate`: its table, its JSON, and its error messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.cli.simulate_request import SimulateRequest
from sageLLM.runtime.cli.simulate_setup import make_setup

from .test_layer_profile import profile

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
    assert lines[0].startswith("mode           TTFT ms p50/p90/p99  TPOT ms p50/p90/p99")
    assert [line.split()[0] for line in lines[1:7]] == [
        "strict",
        "prefill_first",
        "time_share",
        "hybrid",
        "vllm",
        "auto",
    ]
    assert lines[8].startswith("Best for TTFT <= 1000 ms and TPOT <= 100 ms: ")
    assert lines[9].startswith("Disaggregation ")


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
        (
            (*SYNTHETIC, "--mode", "both"),
            "--mode must be one of strict, prefill_first, time_share, hybrid, vllm, auto, got both",
        ),
        (
            (*SYNTHETIC, "--mode", "strict", "--decode-workers", "0"),
            "strict mode requires at least one decode worker, got --decode-workers 0",
        ),
        (
            (*SYNTHETIC, "--hardware", "abacus"),
            f"--hardware must be one of {', '.join(HARDWARE)}, or a .yaml file, got abacus",
        ),
        (
            (*SYNTHETIC, "--prefill-tp", "2", "--decode-tp", "1", "--tp", "2"),
            "--tp 2 must divide the 3 devices of strict mode, as the other modes have as many; pass another --tp, "
            "or --mode strict",
        ),
        (
            (*SYNTHETIC, "--compare"),
            "--compare requires --trace with all its requests at their own times: omit --rate, --num-requests and "
            "--skip-bad-rows",
        ),
        ((*SYNTHETIC, "--ep", "2", "--mode", "hybrid"), "{model}: --ep 2 requires a model with experts"),
        ((*SYNTHETIC, "--ep", "3", "--mode", "hybrid"), "--ep 3 must divide the 2 workers"),
        ((*SYNTHETIC, "--ep", "2", "--mode", "strict"), "--ep 2 requires --pp 1 and modes other than strict"),
        (("--trace", "gone.csv"), "[Errno 2] No such file or directory: 'gone.csv'"),
    ],
)
def test_an_error_names_the_rule_and_the_value(model: str, arguments: tuple[str, ...], message: str) -> None:
    done = simulate("--model", model, *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message.format(model=model)}")


def test_one_worker_serves_in_every_mode_but_strict(model: str) -> None:
    one = figures(model, "--decode-workers", "0")["modes"]
    assert list(one) == ["prefill_first", "time_share", "hybrid", "vllm", "auto"]
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


@pytest.mark.parametrize(
    ("mode", "arguments", "is_slower"),
    [
        ("vllm", ("--step-overhead-us", "3000"), True),
        ("vllm", ("--request-overhead-us", "300"), True),
        ("hybrid", ("--tp", "2"), False),
        ("hybrid", ("--max-batch-size", "2"), True),
        ("hybrid", ("--max-decode-context", "400"), True),
        ("vllm", ("--pp", "2"), True),  # each step of half the requests waits for the head, most of the second stage
        ("vllm", ("--long-prefill-threshold", "16"), True),
        ("strict", ("--prefill-tp", "2"), False),
        ("strict", ("--decode-tp", "2"), False),
    ],
)
def test_an_option_changes_the_service(model: str, mode: str, arguments: tuple[str, ...], is_slower: bool) -> None:
    plain = figures(model, "--mode", mode)["modes"][mode]
    other = figures(model, "--mode", mode, *arguments)["modes"][mode]
    total = {name: one["e2e"]["50"] for name, one in (("plain", plain), ("other", other))}
    assert (total["other"] > total["plain"]) is is_slower and total["other"] != total["plain"]


def test_mode_vllm_has_the_stages_of_vllm(model: str) -> None:
    """Two layers each of four, with a head as large as two: three and one in the engine."""
    setup = make_setup(SimulateRequest(model=model, modes=("hybrid", "vllm"), pipeline_depth=2), 512)
    assert setup.vllm is not None and setup.vllm.stage_shares is not None, "vllm is one of the modes"
    assert max(setup.stage_shares) < 0.54 and setup.vllm.stage_shares[1] > 0.68
    assert setup.kv_budget != setup.vllm.kv_budget
    without = make_setup(SimulateRequest(model=model, modes=("hybrid",), pipeline_depth=2), 512)
    assert without.vllm is None and without.stage_shares == setup.stage_shares


def test_a_row_for_each_chunk_size(model: str) -> None:
    done = figures(model, "--mode", "hybrid", "--chunk-size", "64", "--chunk-size", "1024")["modes"]
    assert list(done) == ["hybrid/64", "hybrid/1024"]
    assert done["hybrid/64"]["num_steps"] > done["hybrid/1024"]["num_steps"]


def test_a_preempted_request_finds_its_blocks_in_the_prefix_cache(model: str) -> None:
    crowded = ("--rate", "5000", "--output", "100", "200", "--num-blocks", "80", "--decode-workers", "0")
    small = ("--mode", "vllm", *crowded, "--no-full-sequence-gate")
    cached, recomputed = (
        figures(model, *small, option)["modes"]["vllm"] for option in ("--prefix-caching", "--no-prefix-caching")
    )
    assert cached["num_preemptions"] and recomputed["num_preemptions"]
    assert cached["duration_s"] < recomputed["duration_s"]


def test_the_gate_of_mode_vllm_is_an_option(model: str) -> None:
    """With short steps, prompts that are admitted for their first chunk find no blocks for the rest."""
    args = ("--mode", "vllm", "--rate", "5000", "--num-blocks", "80", "--decode-workers", "0", "--max-prefill-tokens")
    gated, admitted = (
        figures(model, *args, "32", option)["modes"]["vllm"]
        for option in ("--full-sequence-gate", "--no-full-sequence-gate")
    )
    assert gated["num_preemptions"] < admitted["num_preemptions"]
    assert gated == figures(model, *args, "32")["modes"]["vllm"], "the default"


def test_the_longest_sequence_cuts_answers(model: str) -> None:
    whole, cut = (figures(model, "--mode", "hybrid", *length) for length in ((), ("--max-model-len", "180")))
    assert cut["modes"]["hybrid"]["num_refused"] > whole["modes"]["hybrid"]["num_refused"] == 0


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A measured profile of the model for one and for two devices."""
    for degree in (1, 2):
        folder = profile(tmp_path / "bundle" / f"tp{degree}")
        with (folder / "dense.csv").open("a") as file:
            file.write("\nrotary_emb,1,1\nrotary_emb,1001,1")
    return tmp_path / "bundle"


def test_a_profile_of_several_devices_adds_the_collectives_of_the_hardware(model: str, bundle: Path) -> None:
    """The two degrees have the same tables here, so the difference is the time on the links."""
    args = ("--mode", "vllm", "--profile", str(bundle), "--hardware")
    tpot = {
        (hardware, tp): figures(model, *args, hardware, "--tp", tp)["modes"]["vllm"]["mean_tpot"]
        for hardware in ("h100", "rtx_pro_6000")
        for tp in ("1", "2")
    }
    assert tpot["h100", "1"] == pytest.approx(tpot["rtx_pro_6000", "1"])
    assert tpot["h100", "1"] < tpot["h100", "2"] < tpot["rtx_pro_6000", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--tp", "2"),
            "--tp 2 with --profile requires --hardware, for the links between devices",
        ),
        (
            ("--pp", "2"),
            "--pp 2 with --profile requires --hardware, for the links between devices",
        ),
        (("--tp", "4", "--hardware", "h100"), "{bundle}: expected tables in a folder tp4, got tp1, tp2"),
    ],
)
def test_a_profile_that_does_not_describe_the_deployment(
    model: str, bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = simulate("--model", model, *SYNTHETIC, "--profile", str(bundle), *arguments)
    assert (done.exit_code, done.stderr) == (1, f"error: {message.format(bundle=bundle)}\n")


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "head_dim": 128}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | experts | {"architectures": ["Qwen3MoeForCausalLM"]}))
    return path


def test_workers_share_experts(mixture: Path) -> None:
    whole, shared = (figures(str(mixture), "--mode", "vllm", "--ep", size)["modes"]["vllm"] for size in ("1", "2"))
    assert whole["mean_tpot"] != shared["mean_tpot"]
    assert list(figures(str(mixture), "--ep", "2")["modes"]) == [
        "prefill_first",
        "time_share",
        "hybrid",
        "vllm",
        "auto",
    ]


def test_a_profile_without_the_tables_of_the_model(mixture: Path, bundle: Path) -> None:
    path = mixture
    done = simulate("--model", str(path), *SYNTHETIC, "--profile", str(bundle))
    assert done.stderr == f"error: {bundle}/tp1/dense.csv: expected rows for qk_norm, got none\n"
    with (bundle / "tp1" / "dense.csv").open("a") as file:
        file.write("\nqk_norm,1,1\nqk_norm,1001,1")
    done = simulate("--model", str(path), *SYNTHETIC, "--profile", str(bundle))
    assert done.stderr == f"error: {bundle}/tp1/moe.csv: expected the times of 8 experts, got no such file\n"


TIMELINE = [
    {"arrival_time": 50.0, "queued_ts": 7.0, "first_token_ts": 7.5, "last_token_ts": 9.0},
    {"arrival_time": 50.5, "queued_ts": 7.5, "first_token_ts": 8.0, "last_token_ts": 11.0},
]


def test_a_comparison_with_a_measured_run(model: str, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(json.dumps({"input_toks": 100, "output_toks": 4} | row) for row in TIMELINE))
    done = simulate("--model", model, "--trace", str(path), "--compare", "--mode", "vllm")
    lines = done.stdout.splitlines()
    assert lines[2].split()[:3] == ["measured", "500/500/500", "750/950/995"]
    assert lines[4].startswith("Error of vllm: TTFT mean -9")
    data = json.loads(simulate("--model", model, "--trace", str(path), "--compare", "--json").stdout)
    ours = data["modes"]["hybrid"]["output_throughput"]
    assert data["measured"]["output_throughput"] == pytest.approx(8 / 4.0)
    assert data["errors"]["hybrid"]["throughput"] == pytest.approx(ours / 2 - 1)
    path.write_text(json.dumps(TIMELINE[0]))
    done = simulate("--model", model, "--trace", str(path), "--compare")
    assert done.stderr.startswith(f"error: {path}:1: expected the measured times of a request (arrival_time, ")


@pytest.mark.parametrize("option", ["--step-overhead-us", "--request-overhead-us"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_time_of_the_host_that_is_no_time_is_refused(model: str, option: str, value: str) -> None:
    done = simulate("--model", model, *SYNTHETIC, "--mode", "hybrid", option, value)
    assert done.exit_code != 0 and ("must be finite seconds" in done.stderr or option in done.stderr)


def test_bad_rows_are_refused_with_the_option_that_skips_them(model: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival_time": 1, "input_toks": 9, "output_toks": 2}\n{"arrival_time": 2}\n')
    done = simulate("--model", model, "--trace", str(path), "--mode", "hybrid")
    bad = f"{path}:2: the key 'input_toks' is missing"
    assert done.stderr == f"error: {bad}; pass --skip-bad-rows to skip and count such rows\n"
    done = simulate("--model", model, "--trace", str(path), "--mode", "hybrid", "--skip-bad-rows")
    assert done.exit_code == 0
    assert done.stderr.startswith(f"{path}: skipped 1 of 2 rows, the first: {bad}\n")


@pytest.fixture
def own_hardware(tmp_path: Path) -> Path:
    """The entry of the H100 with a quarter of its memory bandwidth, outside the specs."""
    text = (Path(__file__).parents[2] / "specs" / "hardware" / "h100.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("hardware: h100", "hardware: mine").replace("3.0e12", "7.5e11"))
    return path


def test_a_hardware_file_outside_the_specs(model: str, own_hardware: Path) -> None:
    mine, h100 = (figures(model, "--mode", "hybrid", "--hardware", str(name)) for name in (own_hardware, "h100"))
    assert mine["modes"]["hybrid"]["mean_tpot"] > 2 * h100["modes"]["hybrid"]["mean_tpot"]
    own_hardware.write_text(own_hardware.read_text().replace("7.5e11", "3.0e12"))
    assert figures(model, "--mode", "hybrid", "--hardware", str(own_hardware)) == h100


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_bytes: ", "memory_byte: ", "error[SAGE"),
        ("memory_bandwidth: 7.5e11", "memory_bandwidth: -1", "error[SAGE"),
        ("compute: 0.863", "compute: 0", "error[SAGE"),
        ("schema: hardware/v1", "schema: dims/v1", "error[SAGE"),
        ("schema: hardware/v1", "", "the line `schema:` is missing"),
        ("hardware: mine", "hardware: [", "error[SAGE"),
    ],
)
def test_a_bad_hardware_file_is_diagnosed(model: str, own_hardware: Path, old: str, new: str, message: str) -> None:
    text = own_hardware.read_text()
    assert old in text
    own_hardware.write_text(text.replace(old, new, 1))
    done = simulate("--model", model, *SYNTHETIC, "--hardware", str(own_hardware))
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr and f"{own_hardware}:" in done.stderr


def test_a_hardware_file_that_is_none(model: str, tmp_path: Path) -> None:
    path = tmp_path / "gone.yaml"
    done = simulate("--model", model, *SYNTHETIC, "--hardware", str(path))
    assert done.stderr == f"error: {path}: expected a hardware file, got no such file\n"
    path.write_text("schema: dims/v1\ndims: {}\n")
    done = simulate("--model", model, *SYNTHETIC, "--hardware", str(path))
    assert done.stderr.startswith(f"error: {path}:1:9: error[SAGE014]: expected `schema: hardware/v1`, got dims/v1\n")


def test_kernels_without_fusion_take_longer(model: str) -> None:
    fused, separate = (figures(model, "--mode", "hybrid", option) for option in ("--fusion", "--no-fusion"))
    assert separate["modes"]["hybrid"]["mean_tpot"] > fused["modes"]["hybrid"]["mean_tpot"]


def test_a_deployment_is_as_its_options(model: str, tmp_path: Path) -> None:
    spec = tmp_path / "it.yaml"
    spec.write_text(
        "schema: deploy/v1\ndeploy: it\nsummary: It.\nmodel: elsewhere\nhardware: a100\n"
        "roles: {prefill: {count: 2}, decode: {tp: 2, limits: {max_num_seqs: 9}}}\n"
        "limits: {max_model_len: 300}\nobjective: {ttft_s: 0.5, tpot_s: 0.25}\n"
    )
    found = simulate("--deploy", str(spec), "--model", model, *SYNTHETIC, "--json")
    same = ("--mode", "strict", "--hardware", "a100", "--prefill-workers", "2", "--prefill-tp", "1", "--decode-tp", "2")
    limits = ("--tp", "2", "--max-batch-size", "9", "--max-model-len", "300", "--slo-ttft", "0.5", "--slo-tpot", "0.25")
    expected = simulate("--model", model, *SYNTHETIC, *same, *limits, "--json")
    assert json.loads(found.stdout) == json.loads(expected.stdout)
    assert json.loads(found.stdout)["modes"].keys() == {"strict"}
    assert simulate("--deploy", str(spec), *SYNTHETIC).stderr.startswith("error: expected elsewhere in .;")
