"""Fits of efficiencies to kernel times: known ones are recovered, tables are read, entries agree with the tables."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.core.cost import Efficiency, Hardware, Link
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.sim.calibration.fit import fit, minimize
from sageLLM.runtime.sim.calibration.kernel_times import AllReduce, Heads, Measured, Row, experts, gemm
from sageLLM.runtime.sim.calibration.read_csv import LayerSizes, read_profile_tables, read_vidur_table
from sageLLM.runtime.sim.calibration.read_parquet import read_parquet_tables
from sageLLM.runtime.sim.calibration.report import family_errors
from sageLLM.runtime.sim.trace import TraceError

from .test_layer_profile import profile
from .test_step_cost import BIG, bare

H100 = bare(HARDWARE["h100"])
HEADS = Heads(32, 8, 128)
TRUE = {
    "gemm": Efficiency(compute=0.7, memory=0.8, overlap=2.0, launch_us=6.0),
    "prefill_attn": Efficiency(compute=0.5, memory=0.9, overlap=1.5, launch_us=8.0, context_ns=15.0),
    "decode_attn": Efficiency(compute=0.4, memory=0.85, overlap=1.4, launch_us=12.0),
    "mixed_attn": Efficiency(compute=0.01, memory=0.9, launch_us=9.0, context_ns=12.0, sequence_us=1.2),
    "default": Efficiency(memory=0.6, launch_us=2.5),
}


def with_times(measured: Measured, hardware: Hardware) -> Measured:
    """The same kernels with the times that the device's efficiencies predict."""
    prompts = hardware.efficiency["prefill_attn"]
    timed = Measured()
    for family, times in measured.families().items():
        seconds = times.predicted_s(hardware, hardware.efficiency[family], prompts)
        for row, time in zip(times.rows, seconds, strict=True):
            timed.add(family, Row(*row)._replace(seconds=float(time)))
    return timed


def kernels() -> Measured:
    measured = Measured()
    for m in (1, 8, 64, 128, 256, 512, 2048, 8192):
        for n, k in ((4096, 4096), (28672, 4096), (4096, 14336)):
            measured.add("gemm", gemm(m, n, k, 0.0))
        measured.add("default", Row(0.0, m * 16384.0, 0.0))
        for start in (0, 1024, 8192):
            measured.add("prefill_attn", HEADS.prompt(start, max(m, 16), 0.0))
        for context in (128, 1024, 8192):
            measured.add("decode_attn", HEADS.decodes(min(m, 256), context, 0.0))
            for chunk in (64, 512):
                measured.add("mixed_attn", HEADS.mixed(256, chunk, min(m, 128), context, 0.0))
    return measured


def test_known_efficiencies_are_recovered() -> None:
    measured = with_times(kernels(), dataclasses.replace(H100, efficiency=TRUE))
    fitted = fit(measured, H100)
    for one in family_errors(measured, fitted):
        assert one.p90 < 0.05, one
    gemms = fitted.efficiency["gemm"]
    assert (gemms.compute, gemms.memory) == pytest.approx((0.7, 0.8), rel=0.03)
    assert fitted.efficiency["default"] == TRUE["default"]
    before = {one.family: one for one in family_errors(measured, H100)}
    assert all(before[family].p90 > 0.2 for family in TRUE), "the test has something to fit"


def test_a_known_link_is_recovered() -> None:
    true = Link(1.5e11, 4.0)
    sizes = [(2.0**i, ranks) for i in range(10, 28, 2) for ranks in (2, 4, 8)]
    rows = [AllReduce(size, ranks, AllReduce(size, ranks, 0.0).predicted_s(H100, true)) for size, ranks in sizes]
    fitted = fit(Measured(all_reduces=rows), H100).link
    assert (fitted.bandwidth, fitted.latency_us) == pytest.approx((true.bandwidth, true.latency_us), rel=0.02)


def test_the_simplex_finds_a_minimum() -> None:
    valley = lambda x: float((x[0] - 3) ** 2 + 10 * abs(x[1] + 2) + (x[0] - 3) * (x[1] + 2))  # noqa: E731
    assert minimize(valley, np.array([0.0, 0.0])) == pytest.approx([3.0, -2.0], abs=0.01)


def test_the_work_of_a_row_is_that_of_the_ops() -> None:
    """The rows have the arithmetic and bytes that the graph's formulas count, so that a fit applies to the graph."""
    layout = MODELS["llama"]
    cost = RooflineStepCost(layout, layout.read_config(HFConfig(BIG)), H100, is_fused=False)
    nodes = {node.node_id: node for node in cost.graph.nodes.values() if isinstance(node, OpNode)}
    env = {"Td": 0, "Tp": 64, "S": 1, "KV": 564, "QK": 64 * 500 + 64 * 65 // 2}
    found = {name: (nodes[name].flops(env), nodes[name].bytes_moved(env)) for name in ("L0.attention.qkv", "L0.ffn.gu")}
    assert found["L0.attention.qkv"] == gemm(64, 6144, 4096, 0.0)[:2]
    assert found["L0.ffn.gu"] == gemm(64, 28672, 4096, 0.0)[:2]
    [attention, *_] = [node for node in nodes.values() if "attention" in node.tags]
    assert (attention.flops(env), attention.bytes_moved(env)) == HEADS.prompt(500, 64, 0.0)[:2]
    env = {"Td": 7, "Tp": 0, "S": 7, "KV": 700, "QK": 700}
    assert (attention.flops(env), attention.bytes_moved(env)) == HEADS.decodes(7, 100, 0.0)[:2]


def test_a_profile_has_the_kernels_of_its_layer(tmp_path: Path) -> None:
    sizes = LayerSizes(4096, HEADS, 14336, 128256)
    found = read_profile_tables(profile(tmp_path), sizes).kernels
    assert found["gemm"][0] == gemm(1, 6144, 4096, 4e-6)
    assert len(found["gemm"]) == 2 * 5 and len(found["sample"]) == 2 and len(found["default"]) == 2 * 4
    assert found["prefill_attn"][0] == HEADS.prompt(0, 16, 16e-6)
    assert found["decode_attn"][0] == HEADS.decodes(1, 16, 16e-6)
    assert found["mixed_attn"][0] == HEADS.mixed(0, 32, 8, 1024, (32 + 8 * 1024 + 5) / 1e6)
    (tmp_path / "moe.csv").write_text("tokens,activated_experts,time_us\n4,6,50\n")
    mixture = sizes._replace(expert_inner=768, experts_per_token=2)
    [row] = read_profile_tables(tmp_path, mixture).kernels["experts"]
    assert row.flops == 2 * 4 * 2 * 4096 * 768 * 3 / 2 and row.seconds == 25e-6
    assert row.num_bytes == 6 * 3 * 768 * 4096 + 4 * 4096 + 8 * (3 * 768 + 4096)
    (tmp_path / "dense.csv").write_text("layer,tokens,time_us\no_proj,x,1\n")
    with pytest.raises(TraceError, match=r"dense.csv:2: could not convert string to float: 'x'"):
        read_profile_tables(tmp_path, sizes)


VIDUR = {
    **{f"time_stats.{name}.median": "0.5" for name in ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_act")},
    **{f"time_stats.{name}.median": "0.25" for name in ("mlp_down_proj", "attn_rope", "input_layernorm", "add")},
    "n_head": "32",
    "n_kv_head": "8",
    "n_embd": "4096",
    "n_expanded_embd": "14336",
    "vocab_size": "128256",
    "num_tokens": "16",
    "num_tensor_parallel_workers": "2",
}


def test_vidurs_rows_are_those_of_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "mlp.csv"
    path.write_text(",".join(VIDUR) + "\n" + ",".join(VIDUR.values()) + "\n")
    found = read_vidur_table(path).kernels
    products = [gemm(16, 3072, 4096, 5e-4), gemm(16, 4096, 2048, 5e-4)]
    assert found["gemm"] == [*products, gemm(16, 14336, 4096, 5e-4), gemm(16, 4096, 7168, 2.5e-4)]
    assert len(found["default"]) == 4
    path.write_text("a,b\n1,2\n")
    with pytest.raises(TraceError, match=r"mlp.csv:2: 'num_tensor_parallel_workers'"):
        read_vidur_table(path)


PARQUET = {
    "gemm_perf": [
        {"gemm_dtype": "bfloat16", "m": 64, "n": 8192, "k": 8192, "latency": 0.1},
        {"gemm_dtype": "fp8", "m": 64, "n": 8192, "k": 8192, "latency": 0.05},
        {"gemm_dtype": "bfloat16", "m": 64, "n": 256, "k": 256, "latency": 0.01},
    ],
    "moe_perf": [{"moe_dtype": "bfloat16", "num_tokens": 4, "latency": 0.05}, {"moe_dtype": "fp8"}],
    "context_attention_perf": [{"batch_size": 2, "isl": 512, "latency": 0.2}],
    "generation_attention_perf": [{"batch_size": 4, "isl": 1, "step": 511, "latency": 0.3}],
    "nccl_perf": [
        {"op_name": "all_reduce", "nccl_dtype": "half", "num_gpus": 4, "message_size": 4096, "latency": 0.02},
        {"op_name": "all_gather", "nccl_dtype": "half", "num_gpus": 4, "message_size": 4096, "latency": 0.02},
    ],
}
ATTENTION = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "window_size": 0}
MIXTURE = {
    "hidden_size": 4096,
    "inter_size": 768,
    "topk": 2,
    "num_experts": 128,
    "moe_tp_size": 1,
    "moe_ep_size": 1,
    "distribution": "balanced",
}
DTYPES = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}


def test_parquet_tables(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, rows in PARQUET.items():
        extra: dict[str, Any] = ATTENTION | DTYPES if "attention" in name else MIXTURE if "moe" in name else {}
        table = pyarrow.Table.from_pylist([row | extra for row in rows])
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    found = read_parquet_tables(tmp_path)
    assert found.kernels["gemm"] == [gemm(64, 8192, 8192, 1e-4)]
    assert found.kernels["prefill_attn"] == [HEADS.prompt(0, 512, 2e-4, num_prompts=2)]
    assert found.kernels["decode_attn"] == [HEADS.decodes(4, 512, 3e-4)]
    assert found.kernels["experts"] == [experts(4, 2, 8, 4096, 768, 5e-5)]
    assert found.all_reduces == [AllReduce(8192, 4, 2e-5)]
    parquet.write_table(pyarrow.table({"m": [1]}), tmp_path / "gemm_perf.parquet")
    with pytest.raises(TraceError, match=r"gemm_perf.parquet: expected a column 'n'"):
        read_parquet_tables(tmp_path)
    (tmp_path / "gemm_perf.parquet").write_text("text")
    with pytest.raises(TraceError, match=r"gemm_perf.parquet: "):
        read_parquet_tables(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gemm_perf.parquet").touch()

    def without_pyarrow(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("sageLLM.runtime.sim.calibration.read_parquet.import_module", without_pyarrow)
    with pytest.raises(TraceError, match=r"pyarrow is required to read parquet; pip install sagellm\[calibration\]"):
        read_parquet_tables(tmp_path)


def calibrate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BIG | {"architectures": ["LlamaForCausalLM"]}))
    return path


def test_a_fitted_entry_can_be_pasted_into_its_file(tmp_path: Path, config: Path) -> None:
    tables = profile(tmp_path / "tp1")
    done = calibrate("--hardware", "h100", "--tables", tables, "--model", config, "--fit")
    assert done.exit_code == 0, done.stderr
    table, fitted = done.stdout.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:3]] == ["gemm", "prefill_attn"]
    text = (Path(__file__).parents[2] / "specs" / "hardware" / "h100.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text[: text.index("efficiency:")] + fitted)
    again = calibrate("--hardware", mine, "--tables", tables, "--model", config)
    assert again.stdout == f"{table}\n", "the file has the fitted errors"
    assert set(yaml.safe_load(fitted)["efficiency"]) >= {"gemm", "default", "mixed_attn"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tables", "{tables}"), "{tables}: expected --model, the config.json of the profiled model"),
        (
            ("--tables", "{tables}", "--model", "{config}", "--model", "{config}"),
            "expected one --model for each profile folder in --tables, got 1 more",
        ),
        (("--tables", "{tables}", "--model", "{config}", "--tp", "2"), "{tables}: expected tables of --tp 2, got"),
        (("--tables", "gone/mlp.csv"), "[Errno 2] No such file or directory: 'gone/mlp.csv'"),
    ],
)
def test_an_error_names_the_tables(tmp_path: Path, config: Path, arguments: tuple[str, ...], message: str) -> None:
    names = {"tables": str(profile(tmp_path / "tp1")), "config": str(config)}
    done = calibrate("--hardware", "h100", *(one.format(**names) for one in arguments))
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {message.format(**names)}")


def test_the_h100_agrees_with_its_tables(data: Path) -> None:
    pytest.importorskip("pyarrow")
    done = calibrate("--hardware", "h100", "--tables", data / "gpu_measured" / "h100_vllm", "--json")
    errors = {one["family"]: one for one in json.loads(done.stdout)}
    for family in ("gemm", "prefill_attn", "decode_attn"):
        assert abs(errors[family]["total"]) < 0.03 and errors[family]["p50"] < 0.07, errors[family]
    assert abs(errors["experts"]["total"]) < 0.1
    assert errors["all_reduce"]["p50"] < 0.2


def test_the_card_of_the_serving_run_agrees_with_its_profile(data: Path, config: Path) -> None:
    run = data / "serving_timelines" / "RTXPRO6000_Llama-3.1-8B"
    config.write_text(json.dumps(BIG | {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256}))
    done = calibrate("--hardware", "rtx_pro_6000", "--tables", run, "--model", config, "--json")
    errors = {one["family"]: one for one in json.loads(done.stdout)}
    for family in ("gemm", "prefill_attn", "decode_attn"):
        assert abs(errors[family]["total"]) < 0.05 and errors[family]["p50"] < 0.1, errors[family]
