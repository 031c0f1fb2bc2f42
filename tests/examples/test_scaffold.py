"""`sagellm new` in a checkout, followed by `sagellm generate`, and names that it refuses.

`tests/repo/test_packaging.py` does the same with an installed package, and runs what is generated.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from few_models import keep_models
from typer.testing import CliRunner

from sageLLM.codegen import driver
from sageLLM.runtime.cli.main import app


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package with a few models, to which commands of `sagellm` add entries."""
    package = tmp_path / "sageLLM"
    for name in ("codegen", "generated", "templates", "specs", "runtime"):
        shutil.copytree(driver.PACKAGE / name, package / name)
    for name in ("pyproject.toml", "_dev/sageLLM/__init__.py"):
        shutil.copy(driver.PACKAGE / name, package)
    keep_models(package / "specs")
    return package


def test_scaffolds_of_a_checkout_generate(checkout: Path, tmp_path: Path) -> None:
    """With the counts of all passes in these models."""
    env = os.environ | {"PYTHONPATH": str(tmp_path), "SAGELLM_CACHE_DIR": str(tmp_path / "cache")}

    def sagellm(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "sageLLM.runtime.cli.entry", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    specs = checkout / "specs"
    assert sagellm("new", "op", "brand_new") == [f"{specs}/ops/brand_new.yaml"]
    assert sagellm("new", "model", "brand_new") == [f"{specs}/models/brand_new.yaml"]
    assert sagellm("new", "pass", "newer") == [f"{specs}/passes/newer.yaml", f"{specs}/ops/newer.yaml"]
    assert sagellm("new", "dialect", "newest") == [f"{specs}/dialects/newest.yaml"]
    wrote = sagellm("generate")
    made = ("ops/brand_new.py", "builders/brand_new.py", "passes/newer.py", "dialects/newest.py")
    assert {f"wrote {name}" for name in made} <= set(wrote)


def new(kind: str, name: str, specs: Path) -> tuple[int, str]:
    """Exit code and output."""
    done = CliRunner().invoke(app, ["new", kind, name, "--specs", str(specs)])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("op", "rms_norm", "'rms_norm' is already defined in specs/ops/norm.yaml:"),
        ("op", "taken", "'taken' is already defined in mine/ops/other.yaml:3:3; choose another name"),
        ("model", "llama", "'llama' is already defined in specs/models/llama.yaml:"),
        ("dialect", "hermes", "'hermes' is already defined in specs/dialects/hermes.yaml:"),
        ("pass", "fuse_norm", "'fuse_norm' is already defined in specs/passes/fusion.yaml:"),
        ("pass", "taken_by", "'taken_by_op' is already defined in mine/ops/other.yaml:6:3; choose another name"),
        ("op", "there", "mine/ops/there.yaml already exists; choose another name, or edit it"),
        ("op", "lambda", "expected an identifier, got 'lambda'"),
        ("op", "Big", "a name must be snake_case, got 'Big'"),
        ("op", "../up", "expected an identifier, got '../up'"),
    ],
)
def test_a_name_that_is_taken_or_invalid_is_refused(kind: str, name: str, message: str, tmp_path: Path) -> None:
    specs = tmp_path / "mine"
    (specs / "ops").mkdir(parents=True)
    op = '    {summary: x, op_type: ELEMENTWISE, inputs: {x: "E[H]"}, outputs: {y: "E[H]"}, compute: y = f32(x)}\n'
    (specs / "ops" / "other.yaml").write_text(f"schema: ops/v1\nops:\n  taken:\n{op}\n  taken_by_op:\n{op}")
    (specs / "ops" / "there.yaml").write_text(f"schema: ops/v1\nops:\n  here:\n{op}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.yaml")}
    code, output = new(kind, name, specs)
    assert (code, message in output) == (1, True), output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.yaml")} == before


def test_a_name_that_does_not_link_is_refused(tmp_path: Path) -> None:
    code, output = new("model", "program", tmp_path / "mine")
    assert code == 100
    assert "error[SAGE204]" in output
    assert "the name 'program' cannot be used; nothing was written" in output
    assert not list(tmp_path.rglob("*.yaml"))
