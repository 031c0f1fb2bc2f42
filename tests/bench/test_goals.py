"""Tests of the goals' benchmark: its figures of a small model, and the table made of them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [str(ROOT / "benchmarks" / name) for name in ("goals", "peers", "")]
MODULES = ("measure", "page", "publish", "table", "correctness", "load", "shapes", "variants", "workloads")
MODEL = ROOT / "examples" / "tiny_python_model"


@pytest.fixture(scope="module")
def goals() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark, which import each other by their plain names."""
    others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}  # modules of other tests
    sys.path[:0] = FOLDERS
    try:
        yield SimpleNamespace(measure=__import__("measure"), page=__import__("page"))
    finally:
        sys.path[:] = [one for one in sys.path if one not in FOLDERS]
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(others)


@pytest.fixture
def measure(goals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    for name, value in (("CONTEXT", 40), ("CHUNK", 64), ("NUM_DECODES", 3), ("PROMPT", 96)):
        monkeypatch.setattr(goals.measure, name, value)
    return goals.measure


def test_the_step_of_both_is_longer_than_its_parts(measure: SimpleNamespace) -> None:
    found = measure.hybrid(MODEL, rounds=2)
    assert found["mixed_ms"] > found["decode_ms"] > 0 and found["chunk_ms"] > 0
    assert found["of_sum"] == pytest.approx((found["decode_ms"] + found["chunk_ms"]) / found["mixed_ms"], rel=0.02)
    assert found["tokens_s"] == pytest.approx(67e3 / found["mixed_ms"], rel=0.02)


def test_the_first_prompt_touches_new_pages(measure: SimpleNamespace) -> None:
    found = measure.first_prefill(MODEL, later=2)
    assert found["first_faults"] > found["later_faults"] and found["first_ms"] > 0 and found["of_later"] > 0


def test_profile_has_every_op_with_fractions_of_the_limits(measure: SimpleNamespace) -> None:
    found = measure.profile(MODEL, rounds=1)
    assert [*found] == ["limits", "prefill", "decode 1", "decode 16"]
    assert found["limits"]["read_gb_s"] > 1 and found["limits"]["peak_gflop_s"] > 1
    attention = found["prefill"]["ops"]["paged_prefill_attention"]
    assert attention["calls"] >= 1 and attention["ms"] > 0 and attention["of_peak"] > 0
    assert "paged_decode_attention" in found["decode 16"]["ops"]
    assert 0 < found["decode 1"]["in_kernels"] <= 1


def test_reads_are_of_the_packed_weights(measure: SimpleNamespace) -> None:
    found = measure.reads(MODEL, rounds=1, length=4)
    assert found["weights_mb"] > 0 and min(found["step_ms"], found["by_weight_ms"], found["whole_ms"]) > 0


def test_table_marks_busy_figures_and_missing_ones(goals: SimpleNamespace) -> None:
    parts = {
        "hybrid": {"135m": {"of_sum": 0.97, "is_quiet": True}, "0.6b": {"of_sum": 0.91, "is_quiet": False}},
        "float_attention": {"any": {"least": 1.2, "ratios": {"1 x 128": 1.2, "16 x 512": 1.5}, "is_quiet": True}},
    }
    machine = {"cpu": "One", "threads": 2, "date": "2026-01-01"}
    row = {"ours": {"median": 30.0, "fraction_of_limit": 0.5}, "vllm": {"median": 20.0}}
    peers = {
        "is_quiet": True,
        "checks": {"135m.ours": {"problem": None}, "135m.vllm": {"problem": None}},
        "rows": {"135m": {"native": {"serve_16": row}}},
    }
    text = goals.page.text_of({"machine": machine, "parts": parts}, [peers, {}])
    assert "| chunk next to 16 decodes, rate of the sum of both | >= 0.9 | 0.97 | 0.91* |" in text
    assert "| 1.20 to 1.50 |  |" in text, "attention is measured without a model"
    assert "| >= 1.5 | 1.50 vllm (50% of limit), not measured, not measured | not measured, not" in text
