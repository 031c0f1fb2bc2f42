"""Hybrid mode against the running-first policy on fixed loads: at least as good by every figure."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "policies.py"


@pytest.fixture(scope="module")
def rows():
    spec = importlib.util.spec_from_file_location("policies", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["policies"] = module
    spec.loader.exec_module(module)
    return module.measure()


@pytest.mark.parametrize("name", ["steps", "ttft", "tpot", "preemptions"])
def test_hybrid_is_as_good_as_running_first(rows, name) -> None:
    ours = sum(getattr(row["hybrid"], name) for row in rows.values())
    theirs = sum(getattr(row["running-first"], name) for row in rows.values())
    assert ours <= theirs
