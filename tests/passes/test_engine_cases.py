"""Text cases of passes of every kind: a graph before, the graph after, and the report of the pass.

`engine_cases/PASS/CASE` holds `before.txt`; `after.txt` and `report.txt` are expected. SAGELLM_ACCEPT=1 rewrites
both.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.ops import OPS
from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes import PASSES
from sageLLM.runtime.core.cost import Link
from sageLLM.runtime.core.ir.text import parse_text, to_text
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.check import verify_schedule
from sageLLM.runtime.core.passes.merge import MergePass
from sageLLM.runtime.core.passes.place import PlacePass

CASES = sorted(path.parent for path in (Path(__file__).parent / "engine_cases").glob("*/*/before.txt"))
ACCEPT = os.environ.get("SAGELLM_ACCEPT") == "1"


# Times in the cases are those of the data sheet, so that a new fit of the entry changes none of them.
DEVICE = replace(HARDWARE["h100"], efficiency={}, link=Link(4.5e11, 3.0))


def new_pass(name: str) -> DeclaredPass:
    kind = PASSES[name]
    assert issubclass(kind, DeclaredPass)
    return kind(hardware=DEVICE) if issubclass(kind, (MergePass, PlacePass)) else kind()


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_before_and_after(folder: Path) -> None:
    before = parse_text((folder / "before.txt").read_text(encoding="utf-8"), OpType, OPS)
    verify(before)
    text = to_text(before)
    one = new_pass(folder.parent.name)
    after = one.apply(before)
    verify(after)
    verify_schedule(after)
    assert to_text(before) == text, "the argument was changed"
    facts = [f"{name} {round(v, 3) if isinstance(v, float) else v}" for name, v in one.report.facts.items()]
    counts = f"nodes {one.report.nodes_before} -> {one.report.nodes_after}"
    found = {"after.txt": to_text(after), "report.txt": "\n".join([counts, *facts]) + "\n"}
    for name, content in found.items():
        if ACCEPT:
            (folder / name).write_text(content, encoding="utf-8")
        assert content == (folder / name).read_text(encoding="utf-8")


def test_every_kind_of_pass_has_a_case() -> None:
    shown = {folder.parent.name for folder in CASES}
    engines = {one.__mro__[1] for one in PASSES.values() if one.__mro__[1].__name__ != "RewritePass"}
    assert engines == {PASSES[name].__mro__[1] for name in shown}
