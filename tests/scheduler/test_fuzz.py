"""Twenty thousand random schedules keep every promise; `make fuzz-scheduler` plays a million."""

import fuzz
import pytest

NUM_SCHEDULES = 20_000
NUM_PARTS = 40


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_random_schedules_keep_every_promise(part) -> None:
    size = NUM_SCHEDULES // NUM_PARTS
    failed = fuzz.play_all(range(part * size, (part + 1) * size))
    assert failed == [], "replay one with: PYTHONPATH=_dev python tests/scheduler/fuzz.py --seed N"


def test_a_failing_seed_is_reported(monkeypatch) -> None:
    monkeypatch.setattr(fuzz.World, "_check_outputs", lambda self: 1 / 0)
    assert fuzz.play_all(range(2)) == [(seed, "ZeroDivisionError: division by zero") for seed in range(2)]
