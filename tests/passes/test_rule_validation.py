"""Generated rule tests of rules that only YAML adds: those of correct rules pass, those of wrong rules fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module

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


FAILED_COMPARISON = "Tensor-likes are not close!"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """For each rule the message of its generated test, or "" if it passes.

    The tests are called here: to start pytest in another process costs four times as much. `tests/examples` does that.
    """
    folder = tmp_path_factory.mktemp("rules")
    (folder / "specs").mkdir()
    (folder / "specs" / "made.yaml").write_text(SPEC, encoding="utf-8")
    driver.generate([folder / "specs"], out=folder / "rules_of_test")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        tests = vars(import_module("rules_of_test.tests.test_rules_made"))
        yield {name.removeprefix("test_"): message(test) for name, test in tests.items() if name.startswith("test_")}
    for name in [name for name in sys.modules if name.partition(".")[0] == "rules_of_test"]:
        del sys.modules[name]


def message(test: Callable[[], None]) -> str:
    try:
        test()
    except AssertionError as error:
        return str(error)
    return ""


def test_every_rule_has_a_test(outcome: dict[str, str]) -> None:
    assert [*outcome] == ["right", "lost_operand", "swapped_results", "lost_attr", "conditional", "never"]


def test_correct_rules_pass(outcome: dict[str, str]) -> None:
    assert outcome["right"] == outcome["conditional"] == ""


def test_a_rule_that_no_test_sizes_satisfy_fails(outcome: dict[str, str]) -> None:
    assert "needs rank(x) > 7" in outcome["never"]


@pytest.mark.parametrize("rule", ["lost_operand", "swapped_results", "lost_attr"])
def test_a_rule_that_changes_numbers_fails(outcome: dict[str, str], rule: str) -> None:
    assert outcome[rule].startswith(FAILED_COMPARISON)
