"""Rules that never fire because an earlier one takes their nodes, with optional operands."""

from pathlib import Path

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import SpecErrors

PASS = """
schema: passes/v1
passes:
  tidy:
    summary: Two rules for one pattern.
    kind: rewrite
    stage: fuse
    level: kernel
    rules:
"""
MATCH = 'match: ["n = layer_norm(x, w, b, eps=eps)", "y = tanh(n)"], keep: [y]'
REQUIRED = 'rewrite: ["p = rms_norm(x, w, eps=eps)", "y = add_bias(p, b)"]'  # only a layer_norm with a bias
OPTIONAL = 'rewrite: ["p = rms_norm(x, w, eps=eps)", "y = sigmoid(p)"]'


@pytest.mark.parametrize(
    ("first", "second", "is_shadowed"),
    [(REQUIRED, OPTIONAL, False), (OPTIONAL, REQUIRED, True), (REQUIRED, REQUIRED, True), (OPTIONAL, OPTIONAL, True)],
)
def test_a_rule_that_requires_an_operand_leaves_the_nodes_without_it(
    tmp_path: Path, first: str, second: str, is_shadowed: bool
) -> None:
    rules = [f"      - {{name: {name}, {MATCH}, {rule}}}\n" for name, rule in (("one", first), ("two", second))]
    (tmp_path / "passes.yaml").write_text(PASS.lstrip() + "".join(rules), "utf-8")
    try:
        driver.load_and_link([tmp_path])
        found = []
    except SpecErrors as error:
        found = [(one.code, one.message) for one in error.diagnostics]
    why = "rule 'two' never fires: 'one' has the same pattern and is tried first"
    assert found == ([("SAGE313", why)] if is_shadowed else [])
