"""Tests of the `sagellm` command: output, streams and exit codes.

Commands run in this process. tests/repo/test_packaging.py starts the installed command as a process.
"""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sageLLM.codegen import driver
from sageLLM.generated.builders import MODELS
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.cli.spec_diff import show_spec_diff


def sagellm(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def linked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links the package's specs once for all commands of a test."""
    specs = driver.load_and_link()
    monkeypatch.setattr(driver, "load_and_link", lambda overlays: specs)


@pytest.mark.usefixtures("linked_once")
def test_explain_knows_ops_models_passes_rules_codes_and_lines() -> None:
    line = next(
        i
        for i, text in enumerate((driver.BASE_OUT / "ops" / "norm.py").read_text().splitlines(), start=1)
        if text.startswith("class RmsNorm")
    )
    starts = {
        "rms_norm": "op rms_norm, specs/ops/norm.yaml:",
        "llama": "model llama, specs/models/llama.yaml:",
        "fuse_norm": "pass fuse_norm, specs/passes/fusion.yaml:",
        "fused_add_rms_norm": "op fused_add_rms_norm, specs/ops/norm.yaml:",
        "chat_h100": "deployment chat_h100, specs/deploy/chat_h100.yaml:",
        "SAGE006": "SAGE006: duplicate key",
        f"generated/ops/norm.py:{line}": f"generated/ops/norm.py:{line} comes from specs/ops/norm.yaml:",
    }
    for name, start in starts.items():
        done = sagellm("explain", name)
        assert (done.exit_code, done.stdout.startswith(start)) == (0, True), done.stdout + done.stderr


def test_explain_knows_rules_and_nodes() -> None:
    rule = sagellm("explain", "linear_silu_mul").stdout
    for line in (
        "rule linear_silu_mul of pass fuse_epilogue, specs/passes/fusion.yaml:",
        "optional: bias",
        "the rules of fuse_epilogue fire L + 1 times in bloom, ",
        "no match? sagellm graph MODEL --why-not linear_silu_mul NODE",
    ):
        assert line in rule
    node = sagellm("explain", "llama:L0.ffn.m")
    assert "spec       specs/ops/linear.yaml: linear_silu_mul" in node.stdout
    assert "fuse_epilogue: linear_silu_mul replaced linear L0.ffn.gu + silu_mul L0.ffn.m" in node.stdout
    missing = sagellm("explain", "llama:L9.n")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr == "error: unknown node L9.n in the decode graph of llama; `sagellm graph` lists them\n"


def test_explain_helps_with_a_misspelt_name() -> None:
    done = sagellm("explain", "rmsnorm")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "unknown name 'rmsnorm'; did you mean 'rms_norm'?\n"


@pytest.mark.parametrize(
    ("format", "start"),
    [("text", "graph llama_decode"), ("json", "{"), ("dot", "digraph"), ("mermaid", "flowchart"), ("html", "<!")],
)
def test_graph_prints_every_format(format: str, start: str) -> None:
    done = sagellm("graph", "llama", "--format", format)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.lstrip().startswith(start)


def test_graph_shows_what_a_pass_changed() -> None:
    done = sagellm("graph", "llama", "--diff")
    assert "= fused_add_rms_norm(" in done.stdout
    assert sagellm("graph", "llama", "--diff", "--only", "").stdout == "no pass changed the graph\n"


def test_graph_names_the_models_that_it_knows() -> None:
    done = sagellm("graph", "lama")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"error: 'lama' is neither a model ({', '.join(MODELS)}) nor a folder with a config.json\n"


def test_lint_prints_findings_as_text_and_as_json(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "x.yaml").write_text("schema: dims/v1\ndims: {Zz: a size}\ndimms: {}\n")
    done = sagellm("lint", "--specs", str(folder))
    assert done.exit_code == 100
    assert done.stdout == (
        "mine/x.yaml:3:1: error[SAGE010]: unknown field 'dimms'\n"
        "    3 | dimms: {}\n      | ^^^^^\n   = help: did you mean 'dims'?\n"
    )
    found = json.loads(sagellm("lint", "--specs", str(folder), "--json").stdout)["diagnostics"]
    assert [one["code"] for one in found] == ["SAGE010"]
    assert sagellm("lint").exit_code == 0


def test_an_overlay_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    done = sagellm("generate", "--specs", str(tmp_path))
    assert done.exit_code == 2
    assert done.stderr == "--specs requires --out FOLDER: an overlay is generated into a separate folder\n"


def test_a_spec_change_is_summed_up_per_model_and_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without their rules fused ops are gone from every graph: more kernels, more bytes, the same operations."""
    specs = tmp_path / "specs"
    shutil.copytree(driver.BASE_SPECS, specs)
    (specs / "passes" / "fusion.yaml").unlink()
    for path in (specs / "ops").glob("*.yaml"):
        path.write_text("\n".join(line for line in path.read_text().splitlines() if "rule:" not in line) + "\n")
    for path in (specs / "models").glob("*.yaml"):
        if path.stem != "llama":
            path.unlink()
    driver.generate(out=tmp_path / "new", base=specs)
    assert show_spec_diff(driver.BASE_OUT, tmp_path / "new", as_json=False) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {"removed: passes/fusion.py", "removed: builders/gpt2.py"} <= {*shown}
    assert not [line for line in shown if ".cache" in line]  # the generator's state is no part of the tree
    changes = [line for line in shown if line.startswith("model llama, ")]
    assert [line.split(":")[0] for line in changes] == [f"model llama, {s}" for s in ("prefill", "decode", "hybrid")]
    assert all("kernels 20 -> 31" in line and "bytes " in line and "flops" not in line for line in changes), changes
