"""Pairs of text: a spec in, code out (`cases/good`); a bad spec in, the exact error out (`cases/bad`).

A case is a folder. Its YAML files are an overlay on the package's specs. A good case has the expected files under
`expected/`, by their path in the generated tree; a bad one has `error.txt`. Specs with a warning (`cases/warned`) have
the exact notes in `notes.txt`. `SAGELLM_ACCEPT=1` rewrites all of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.codes import CODES
from sageLLM.codegen.diagnostics import SpecErrors, render
from sageLLM.codegen.expectations import check_expectations
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.render import format_sources
from sageLLM.runtime.inspect.expectations import missed_expectations

CASES = Path(__file__).parent / "cases"
ACCEPT = os.environ.get("SAGELLM_ACCEPT") == "1"


def folders(kind: str) -> list[Path]:
    return sorted(path.parent for path in (CASES / kind).glob("*/spec.yaml"))


def source_line(folder: Path, file: str, line: int) -> str | None:
    path = folder / file.split("/", 1)[1] if file.startswith(f"{folder.name}/") else driver.BASE_SPECS.parent / file
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[line - 1] if line <= len(lines) else None


def findings(folder: Path, memo: LinkMemo) -> str:
    with pytest.raises(SpecErrors) as caught:
        specs = driver.load_and_link([folder], memo=memo)
        check_expectations(specs.raw, driver.emit(specs), missed_expectations)
    assert all(found.code in CODES for found in caught.value.diagnostics)
    shown = [render(found, lambda file, line: source_line(folder, file, line)) for found in caught.value.diagnostics]
    return "\n".join(shown) + "\n"


@pytest.mark.parametrize("folder", folders("bad"), ids=lambda folder: folder.name)
def test_bad(folder: Path, memo: LinkMemo) -> None:
    found, expected = findings(folder, memo), folder / "error.txt"
    if ACCEPT:
        expected.write_text(found, encoding="utf-8")
    assert found == expected.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", folders("good"), ids=lambda folder: folder.name)
def test_good(folder: Path, memo: LinkMemo) -> None:
    expected = sorted((folder / "expected").rglob("*.*"))
    assert expected, "a good case has a file under expected/"
    outputs = {output.path: output for output in driver.emit(driver.load_and_link([folder], memo=memo))}
    names = [path.relative_to(folder / "expected").as_posix() for path in expected]
    made = {output.path: output.text for output in format_sources(outputs[name] for name in names)}
    for name, path in zip(names, expected, strict=True):
        if ACCEPT:
            path.write_text(made[name], encoding="utf-8")
        assert made[name] == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", folders("warned"), ids=lambda folder: folder.name)
def test_warned(folder: Path, memo: LinkMemo) -> None:
    outputs = driver.emit(driver.load_and_link([folder], memo=memo))
    found, expected = "".join(f"{note}\n" for output in outputs for note in output.notes), folder / "notes.txt"
    if ACCEPT:
        expected.write_text(found, encoding="utf-8")
    assert found == expected.read_text(encoding="utf-8")


# The cases above share the linked base of one process. A sample of them is run as users do, which shares nothing;
# SAGELLM_CASES=all runs all of them so (`make cases`).
IS_SAMPLE = os.environ.get("SAGELLM_CASES") != "all"
GOOD, BAD = ["pass_written_out_rule"], ["op_defined_twice", "pass_expectation_missed"]


def sagellm_generate(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sageLLM.runtime.cli.main", "generate", "--specs", str(folder), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("name", GOOD if IS_SAMPLE else [folder.name for folder in folders("good")])
def test_a_process_generates_what_a_good_case_expects(name: str, tmp_path: Path) -> None:
    expected = CASES / "good" / name / "expected"
    done = sagellm_generate(CASES / "good" / name, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for path in expected.rglob("*.*"):
        assert (tmp_path / "out" / path.relative_to(expected)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", BAD if IS_SAMPLE else [folder.name for folder in folders("bad")])
def test_a_process_reports_what_a_bad_case_expects(name: str, tmp_path: Path) -> None:
    done = sagellm_generate(CASES / "bad" / name, tmp_path / "out")
    assert (done.returncode, done.stdout) == (100, (CASES / "bad" / name / "error.txt").read_text(encoding="utf-8"))
    assert not (tmp_path / "out").exists()
