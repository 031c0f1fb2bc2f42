"""Each planted bug is caught: by a random schedule, or by the test of the promise that it breaks."""

from collections.abc import Callable

import fuzz
import pytest
import test_first_sketch_regressions as first_sketch
import test_forks_and_swaps
import test_pd_scheduler
import test_plan_ahead
import test_policies
import test_prefix_caching
import test_transfer
from fake_engine import FakeEngine
from planted_bugs import BUGS, Bug

MAX_SCHEDULES = 400

# Broken promises that short schedules cannot show, or show rarely.
CAUGHT_BY_TEST: dict[str, Callable[[], None]] = {
    "round robin does not rotate": lambda: first_sketch.test_08_decodes_beyond_the_batch_size_are_served_round_robin(
        FakeEngine, "hybrid"
    ),
    "prefill waits for all decodes": lambda: first_sketch.test_03_a_new_request_does_not_wait_for_all_decodes_to_end(
        FakeEngine, "time_share"
    ),
    "blocks are freed before the pending step ends": lambda: (
        test_plan_ahead.test_blocks_of_a_stopped_request_are_freed_after_the_step_planned_ahead(FakeEngine)
    ),
    "blocks are freed during a copy": lambda: test_transfer.test_abort_in_every_state_leaks_nothing(
        FakeEngine, 3, "confirm"
    ),
    "a victim returns and is preempted again": lambda: (
        test_pd_scheduler.test_a_preempted_request_does_not_return_to_be_preempted_again(FakeEngine)
    ),
    "a migrating request is a victim": lambda: (
        test_pd_scheduler.test_a_decode_is_skipped_rather_than_preempted_for_a_copy_of_lower_rank(FakeEngine)
    ),
    "a preempting step admits": lambda: test_pd_scheduler.test_a_preempting_step_admits_nothing(FakeEngine),
    "a rolled-back step loses its copies": lambda: test_forks_and_swaps.test_abort_during_a_swap_leaks_nothing(
        FakeEngine, "host", "rolled back"
    ),
    "salts are ignored": lambda: test_prefix_caching.test_salts_share_nothing_and_caching_can_be_disabled(FakeEngine),
    "one rank is enough": lambda: test_transfer.test_the_gate_opens_with_the_last_layer_of_the_last_rank_in_any_order(
        FakeEngine
    ),
    "attempts start again after a preemption": lambda: (
        test_transfer.test_an_acknowledgement_from_before_a_recomputation_is_dropped(FakeEngine)
    ),
    "a superseded copy is begun": lambda: test_transfer.test_a_failure_withdraws_the_copy_planned_ahead(FakeEngine),
    "overtaking is not bounded": lambda: test_policies.test_overtaking_is_bounded("priority", {"priority": -1}),
}

# The seed of a short schedule that catches the bug. The search starts there, and passes on to the next seeds when a
# change of the fuzzer has changed the schedules.
SEEDS = {
    "an outgrown request keeps its KV": 5,
    "an outgrown request comes back as it was": 0,
    "an outgrown request is swapped in": 2407,
    "KV of short sequences is found by long ones": 5,
    "a step ahead decodes an outgrown request": 5,
    "a victim keeps its progress": 171,
    "a victim is lost": 38,
    "chunks of a victim in a pending step count": 201,
    "a victim's blocks are not freed": 44,
    "a fork without a slot is lost": 18,
    "the batch size is not bounded": 7,
    "cached tokens are computed again": 23,
    "an abort does not see waiting requests": 163,
    "a complete request is not ended": 267,
    "a fork's last block is not copied": 69,
    "a fork starts past its parent": 2,
    "a swap never ends": 220,
    "a swap-in is not announced": 220,
    "a rolled-back step loses its blocks": 44,
    "a rolled-back step keeps its prefill": 22,
    "a dead worker's cache is used": 148,
    "prefill has a second budget": 79,
    "the token budget never shrinks": 28,
    "a replay ends with the prompt": 10,
    "a block is allocated too late": 2,
    "a skipped slot advances": 24,
    "a skipped slot has computed": 9,
    "a failed decode step counts": 40,
    "a pending step counts for a new decode": 66,
    "no length gate": 105,
    "an old attempt counts": 48,
    "a failed copy is not sent again": 109,
    "a lease never ends": 80,
    "a cancellation is lost": 129,
    "the source is kept": 52,
    "the target is not reserved": 36,
    "uncomputed blocks are shared": 294,
    "one token too many": 267,
    "a fork's blocks are not counted": 2,
    "the whole prompt is a cache hit": 53,
}


def catch(bug: Bug) -> str | None:
    """The failure that the bug causes, or None."""
    if bug.name in CAUGHT_BY_TEST:
        try:
            CAUGHT_BY_TEST[bug.name]()
        except (AssertionError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return None
    first = SEEDS[bug.name]
    failures = fuzz.failing_seeds(range(first, first + MAX_SCHEDULES))
    return next((f"seed {seed}: {reason}" for seed, reason in failures), None)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_a_planted_bug_is_caught(bug, monkeypatch) -> None:
    monkeypatch.setattr(fuzz, "MAX_STEPS", 800)
    bug.plant(monkeypatch)
    assert catch(bug) is not None, f"{bug.name}: no failure in {MAX_SCHEDULES} schedules"


def test_there_are_enough_bugs() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 25
