"""Docs and `explain` on how ops, rewrite rules and models refer to one another, held against the specs."""

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.explain import explain
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.model.specs import Specs


@pytest.fixture(scope="module")
def specs(memo: LinkMemo) -> Specs:
    return driver.load_and_link(memo=memo)


def facts(op: str, specs: Specs) -> dict[str, str]:
    """The last table of the op's section, by row."""
    rows = [line.strip("| ").split(" | ") for line in explain(op, specs, driver.BASE_OUT).splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_an_op_of_a_pattern_is_fused_by_the_rule(specs: Specs) -> None:
    rms_norm = facts("rms_norm", specs)
    assert "`fused_add_rms_norm` (pass `fuse_norm`)" in rms_norm["fused by"]
    assert rms_norm["produced by"] == "no rule"
    assert {"`llama`", "`qwen3`"} <= set(rms_norm["used by"].split(", "))
    assert "`gpt2`" not in rms_norm["used by"]


def test_an_op_of_a_replacement_is_produced_by_the_rule(specs: Specs) -> None:
    fused = facts("fused_add_rms_norm", specs)
    assert fused["produced by"] == "`fused_add_rms_norm` (pass `fuse_norm`)"
    assert fused["used by"] == "no model"
    assert "fused_add_rms_norm" not in fused["fused by"]


def test_every_rule_and_model_is_listed_at_its_ops(specs: Specs) -> None:
    """The sections name exactly the rules and layouts that the linked specs refer to the op with."""
    sections = {op: facts(op, specs) for op in specs.ops}
    for op, section in sections.items():
        for one in specs.passes.values():
            for rule in one.rules:
                is_consumed = any(call.op.name == op for call in rule.pattern)
                is_produced = any(call.op.name == op for call in rule.replacement)
                assert (f"`{rule.name}`" in section["fused by"]) == is_consumed, (op, rule.name)
                assert (f"`{rule.name}`" in section["produced by"]) == is_produced, (op, rule.name)
        for name, model in specs.models.items():
            lines = " ".join(line for block in model.blocks.values() for line in block.lines)
            if f"= {op}(" in lines:
                assert f"`{name}`" in section["used by"].split(", "), (op, name)


def test_the_committed_pages_say_the_same(specs: Specs) -> None:
    page = (driver.BASE_OUT / "docs" / "ops" / "norm.md").read_text(encoding="utf-8")
    for op in ("rms_norm", "fused_add_rms_norm"):
        section = page.partition(f"## {op}\n")[2].partition("\n## ")[0].strip()
        assert section in explain(op, specs, driver.BASE_OUT)
