"""Random ops: each generates kernels that agree with its reference, or gets diagnostics with a place and a remedy.

The suite runs the first seeds. Others: `SAGELLM_RANDOM_OPS=100:200 python -m pytest tests/kernels/test_random_ops.py`.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from native import needs_compiler
from overlays import emitted, linked, run_on_all_targets
from random_ops import random_op

from sageLLM.codegen.diagnostics import SpecErrors

FIRST, LAST = map(int, os.environ.get("SAGELLM_RANDOM_OPS", "0:24").split(":"))


def test_random_ops_generate_code_or_get_diagnostics() -> None:
    refused = 0
    for seed in range(FIRST, LAST + 200):
        op = random_op(seed)
        try:
            emitted(linked({f"op_{seed}": op}))
        except SpecErrors as errors:
            refused += 1
            assert all(one.span is not None and one.message for one in errors.diagnostics), errors.diagnostics
        except Exception as error:
            raise AssertionError(f"seed {seed}, {op} made {error!r}") from error
    assert refused < 100, "most random ops must be valid to prove anything"


@needs_compiler
@pytest.mark.timeout(600)  # one C++ file per element type is compiled
def test_random_ops_agree_with_their_references(tmp_path: Path) -> None:
    ops = {f"op_{seed}": op for seed in range(FIRST, LAST) if is_valid(op := random_op(seed))}
    runs = run_on_all_targets(ops, tmp_path, "1")
    assert [(run, ops[run["op"]]) for run in runs if run["wrong"]] == []
    counts = {target: sum(run["target"] == target for run in runs) for target in ("reference", "cpu", "triton")}
    assert counts["reference"] == len(ops) and min(counts.values()) > len(ops) // 2, counts


def is_valid(op: dict[str, Any]) -> bool:
    try:
        return bool(linked({"made_op": op}).ops)
    except SpecErrors:
        return False
