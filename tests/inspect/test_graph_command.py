"""Tests of `sagellm graph`: reports on wrong rules, rules that do not fire, and passes that crash."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sageLLM.codegen import driver
from sageLLM.generated.builders import MODELS
from sageLLM.generated.passes import PASSES
from sageLLM.generated.passes.fusion import FuseNorm
from sageLLM.runtime.cli.graph import GraphRequest, show_graph
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.registry.plugins import Registry, load_registry

WRONG = """schema: passes/v1
passes:
  tidy:
    summary: Loses an operand of every second sum.
    kind: rewrite
    stage: fuse
    level: kernel
    after: [fuse_qk]
    before: [fuse_epilogue]
    rules:
      - name: lost_operand
        match: ["f = linear(m, w, b)", "y = add(x, f)"]
        keep: [y, f]
        rewrite: ["f = linear(m, w, b)", "y = add(x, x)"]
        bounded: 1
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated tree with one rule that changes the results."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "specs").mkdir()
    (folder / "specs" / "wrong.yaml").write_text(WRONG, encoding="utf-8")
    driver.generate([folder / "specs"], out=folder / "generated")
    return folder / "generated"


def answer(capsys: pytest.CaptureFixture[str], code: int = 0, model: str = "llama", **asked: Any) -> list[str]:
    assert show_graph(GraphRequest(model, "decode", **asked)) == code
    shown = capsys.readouterr()
    return (shown.out + shown.err).splitlines()


def test_the_first_pass_and_the_first_rewrite_that_change_results_are_named(
    plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = answer(capsys, 1, verify_numerics=True, plugins=[plugin])
    assert lines[:3] == [f"{name}: bitwise equal" for name in ("fuse_collective", "fuse_norm", "fuse_qk")]
    assert lines[3].startswith("tidy: logits differs by ")
    assert lines[-1] == "tidy changes the results; `--bisect` finds the rewrite"
    assert answer(capsys, 1, bisect=True, plugins=[plugin]) == [
        "rewrite 6 is the first that changes a result: lost_operand replaces linear L1.ffn.f, add L1.x_1"
        " by linear L1.ffn.f, add L1.x_1",
        "before: --rewrite-limit 5; with it: --rewrite-limit 6; without the rule: --disable lost_operand",
    ]
    assert answer(capsys, bisect=True, plugins=[plugin], disable="tidy") == ["no rewrite changes a result"]


@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_the_package_s_passes_keep_every_bit(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("fuse_collective", "fuse_norm", "fuse_qk", "fuse_epilogue", "fuse_sampling")
    lines = answer(capsys, model=model, verify_numerics=True)
    assert lines == [f"{name}: bitwise equal" for name in names]


@pytest.mark.parametrize(
    ("rule", "node", "said"),
    [
        ("fused_add_rms_norm", "L0.n", "matched 1 of 2 nodes: rms_norm.x comes from embedding, expected add"),
        ("linear_add", "L1.x_1", "fired at L1.x_1: linear L1.ffn.f + add L1.x_1 -> linear_add L1.x_1"),
        ("linear_add", "L0.x_1", "L0.x_1 was replaced before fuse_epilogue: fused_add_rms_norm of fuse_norm made "),
        ("linear_silu_mul", "L0.ffn.gu", "fired at L0.ffn.m"),
        ("lm_head_sample", "tokens", "fired at tokens: lm_head logits + sample tokens -> lm_head_sample tokens"),
        ("qk_rope_kv_store", "tokens", "tokens is sample, without a kv_store downstream"),
    ],
)
def test_why_not(rule: str, node: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in "\n".join(answer(capsys, why_not=(rule, node)))


def test_unknown_names_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, 1, why_not=("fuse_all", "L0.n")) == ["error: unknown or disabled rule fuse_all"]
    assert answer(capsys, 1, why_not=("linear_add", "nowhere"))[0].startswith("error: unknown node nowhere")
    assert answer(capsys, 1, only="fuse_all")[0].startswith("error: unknown pass or rule fuse_all; known are ")


def test_rules_are_chosen_and_limited(capsys: pytest.CaptureFixture[str]) -> None:
    def ops(**asked: Any) -> str:
        return " ".join(line.split(" = ")[1].split("(")[0] for line in answer(capsys, **asked) if " = " in line)

    assert "linear_add" in ops() and "linear_add" not in ops(disable="linear_add")
    assert ops(only="linear_silu_mul").count("fused") == 0 < ops(only="linear_silu_mul").count("linear_silu_mul")
    assert ops(rewrite_limit=2).count("fused_add_rms_norm") == 2


def test_statistics_count_the_savings(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in answer(capsys, stats=True)]
    row = next(words for words in lines if words[0] == "qk_rope_kv_store")
    assert (row[1:4], row[5:8]) == (["2", "2", "2"], ["-6", "-4", "0"])
    assert row[8].startswith("-")


class Crash(FuseNorm):
    """A pass that stops midway."""

    def run(self, graph: ExecutionGraph) -> None:
        super().run(graph)
        raise RuntimeError("out of\nluck")


@pytest.fixture
def crash_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    base = load_registry()
    registry = Registry(base.packages, base.ops, base.models, {**PASSES, "fuse_norm": Crash}, base.methods)
    layout = MODELS["llama"]
    compiler = ModelCompiler(layout, layout.read_config(HFConfig(layout.tiny)), registry, dtype="f32")
    with pytest.raises(RuntimeError, match="out of") as caught:
        compiler.kernel_graph("decode")
    (note,) = caught.value.__notes__
    yield note


def test_a_pass_that_crashes_leaves_a_file_to_run_it_on(
    crash_note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = tmp_path.glob("sagellm-*.txt")
    assert crash_note.endswith(f"to reproduce: sagellm graph {path} --only fuse_norm")
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert head[0] == "# fuse_norm fails on this graph: RuntimeError: out of luck"
    assert head[2].startswith("graph llama_decode level=kernel")
    lines = answer(capsys, model=str(path), only="fuse_norm")
    assert sum("= fused_add_rms_norm(" in line for line in lines) == 3


def test_a_trace_has_planned_and_measured_times(capsys: pytest.CaptureFixture[str]) -> None:
    check_trace(*answer(capsys, format="trace", measure=True))


def check_trace(line: str) -> list[Any]:
    """Checks that both schedules have the same nodes on the same tracks, and returns the measured events."""
    spans = [event for event in json.loads(line)["traceEvents"] if event["ph"] == "X"]
    planned, measured = ([event for event in spans if event["pid"] == process] for process in (0, 1))
    assert [(e["args"]["node"], e["tid"]) for e in planned] == [(e["args"]["node"], e["tid"]) for e in measured] != []
    for one, other in zip(planned, measured, strict=True):
        assert (one["ts"], one["dur"]) == (other["args"]["planned_start_us"], other["args"]["planned_us"])
        assert (other["ts"], other["dur"]) == (other["args"]["measured_start_us"], other["args"]["measured_us"])
    kernels = [e for e in measured if e["args"]["planned_us"] > 0]
    assert all(e["dur"] > 0 for e in kernels) and kernels
    return measured


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
def test_a_rank_is_measured_with_its_streams(capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes run the graph; collectives are in a track of their own, and keep the planned waits."""
    (line,) = answer(capsys, model="phi", format="trace", measure=True, tensor_parallel_size=2)
    measured = check_trace(line)
    assert {e["cat"] for e in measured if e["tid"] == 1} == {"comm_allreduce"}
    flows = [event for event in json.loads(line)["traceEvents"] if event["ph"] in "sf" and event["pid"] == 1]
    begun, ended = ({e["id"]: e["ts"] for e in flows if e["ph"] == kind} for kind in "sf")
    assert begun.keys() == ended.keys() != set()
    assert all(begun[number] <= ended[number] for number in begun)


def test_planned_and_measured_times_are_printed_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    lines = answer(capsys, measure=True)
    assert "device 0, stream 0" in lines
    (row,) = [line.split() for line in lines if line.split()[:1] == ["L0.ffn.m"]]
    assert len(row) == 5 and all(float(number) >= 0 for number in row[1:])
    assert lines[-2].startswith("step: planned ")


def test_the_page_holds_the_passes_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_graph(GraphRequest("llama", None, format="html")) == 0
    page = capsys.readouterr().out
    names = re.findall(r"<h2>(.*?)</h2>", page)
    assert names == [
        f"{stage}{more}" for stage in ("prefill", "decode", "hybrid") for more in ("", " on 2 devices, blocks")
    ]
    assert len(re.findall('role="tab"', page)) == 3 * (1 + 5 + 1 + 3)
    assert 'class="gantt"' in page
