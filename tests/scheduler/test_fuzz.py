"""Random schedules: the same 1,000 in every run; `make fuzz-scheduler` plays a million new ones every day."""

import fuzz
import pytest

NUM_SCHEDULES = 1_000
NUM_PARTS = 4


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_random_schedules_violate_no_invariant(part) -> None:
    size = NUM_SCHEDULES // NUM_PARTS
    failed = fuzz.play_all(range(part * size, (part + 1) * size))
    replay = "PYTHONPATH=_dev python tests/scheduler/fuzz.py --seed"
    assert failed == [], "\n".join(f"{reason}; replay with: {replay} {seed}" for seed, reason in failed)


def test_a_failing_seed_is_reported(monkeypatch) -> None:
    monkeypatch.setattr(fuzz.World, "_check_outputs", lambda self: 1 / 0)
    assert fuzz.play_all(range(2)) == [(seed, "ZeroDivisionError: division by zero") for seed in range(2)]
