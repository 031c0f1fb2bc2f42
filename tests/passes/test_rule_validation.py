"""Tests of the generated rule tests, for rules added in YAML: a correct one passes, and wrong ones fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sageLLM.codegen import driver

SPEC = """schema: passes/v1
passes:
  regroup:
    summary: Made for the test.
    kind: rewrite
    stage: fuse
    level: kernel
    before: [fuse_norm]
    rules:
      - name: right
        match: ["a = add(x, y)", "b = add(a, z)", "n = rms_norm(b, w, eps=eps)"]
        keep: [n]
        rewrite: ["t = add(y, z)", "n, s = fused_add_rms_norm(x, t, w, eps=eps)"]
      - name: lost_operand
        match: ["a = add(x, y)", "b = add(a, z)"]
        keep: [b]
        rewrite: ["b = add(x, y)"]
      - name: swapped_results
        match: ["a = add(x, r)", "y, h = fused_add_rms_norm(a, r, w, eps=eps)"]
        keep: [y, h]
        rewrite: ["h, y = fused_add_rms_norm(x, r, w, eps=eps)"]
      - name: lost_attr
        match: ["s = add(x, x)", "y = rms_norm(s, w, eps=eps)"]
        keep: [y]
        rewrite: ["y = rms_norm(x, w)"]
      - name: conditional
        match: ["a = scale(x, factor=f)", "y = add(a, x)"]
        keep: [y]
        where: ["bytes(x) >= 8 and size(x, 0) > 0", "dtype(x) == 'f64'", "f > 0.0"]
        rewrite: ["b = scale(x, factor=f)", "y = add(x, b)"]
        bounded: 1
      - name: never
        match: ["a = scale(x, factor=f)", "y = add(x, a)"]
        keep: [y]
        where: ["rank(x) > 7"]
        rewrite: ["y = add(x, x)"]
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For each rule the outcome of its generated test."""
    folder: Path = tmp_path_factory.mktemp("rules")
    (folder / "specs").mkdir()
    (folder / "specs" / "made.yaml").write_text(SPEC, encoding="utf-8")
    driver.generate([folder / "specs"], out=folder / "generated")
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider", "-rA", "--tb=no"]
    done = subprocess.run(
        [*command, "generated/tests"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
    )
    found = [line.split() for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED"))]
    return {words[1].split("::test_")[1]: " ".join([words[0], *words[3:]]) for words in found}


def test_right_rules_pass(outcome: dict[str, str]) -> None:
    assert outcome["right"] == outcome["conditional"] == "PASSED"


def test_a_rule_that_cannot_be_tried_fails(outcome: dict[str, str]) -> None:
    assert outcome["never"].startswith("FAILED AssertionError: ")
    assert "needs rank(x) > 7" in outcome["never"]


@pytest.mark.parametrize("rule", ["lost_operand", "swapped_results", "lost_attr"])
def test_a_rule_that_changes_numbers_fails(outcome: dict[str, str], rule: str) -> None:
    assert outcome[rule] == "FAILED AssertionError: Tensor-likes are not close!"
