"""Each planted bug is caught: by a random schedule, or by a test of the promise that it breaks."""

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
CAUGHT_BY = {
    "nobody's turn comes": lambda: first_sketch.test_08_decodes_beyond_the_batch_size_take_turns(FakeEngine, "hybrid"),
    "prefill waits for all decodes": lambda: first_sketch.test_03_a_new_request_does_not_wait_for_all_decodes_to_end(
        FakeEngine, "time_share"
    ),
    "blocks are freed before the step in flight ends": lambda: (
        test_plan_ahead.test_the_blocks_of_one_that_stopped_stay_until_the_step_planned_ahead_is_over(FakeEngine)
    ),
    "blocks are freed under a copy": lambda: test_transfer.test_abort_in_every_state_leaks_nothing(
        FakeEngine, 3, "confirm"
    ),
    "a victim comes back to fall again": lambda: (
        test_pd_scheduler.test_a_preempted_request_does_not_come_back_to_fall_again(FakeEngine)
    ),
    "a copied request is a victim": lambda: (
        test_pd_scheduler.test_a_decode_sits_out_rather_than_fall_for_a_copy_of_lower_rank(FakeEngine)
    ),
    "a preempting step admits": lambda: test_pd_scheduler.test_a_preempting_step_admits_nobody(FakeEngine),
    "a failed step takes its copies with it": lambda: test_forks_and_swaps.test_abort_during_a_swap_leaks_nothing(
        FakeEngine, "host", "rolled back"
    ),
    "salts are ignored": lambda: test_prefix_caching.test_another_salt_shares_nothing_and_the_switch_turns_caching_off(
        FakeEngine
    ),
    "one rank is enough": lambda: test_transfer.test_the_gate_opens_with_the_last_layer_of_the_last_rank_in_any_order(
        FakeEngine
    ),
    "two lives share their attempts": lambda: (
        test_transfer.test_an_acknowledgement_of_an_earlier_life_counts_for_nothing(FakeEngine)
    ),
    "a superseded copy is begun": lambda: test_transfer.test_a_failure_takes_back_the_copy_that_is_planned_ahead(
        FakeEngine
    ),
    "overtaken for ever": lambda: test_policies.test_nobody_is_overtaken_for_ever("priority", {"priority": -1}),
}


def catch(bug: Bug) -> str | None:
    """What catches the bug that is planted now, or None."""
    if bug.name in CAUGHT_BY:
        try:
            CAUGHT_BY[bug.name]()
        except (AssertionError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return None
    return next((f"seed {seed}: {reason}" for seed, reason in fuzz.failing_seeds(range(MAX_SCHEDULES))), None)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_a_planted_bug_is_caught(bug, monkeypatch) -> None:
    monkeypatch.setattr(fuzz, "MAX_STEPS", 800)
    bug.plant(monkeypatch)
    assert catch(bug) is not None, f"{bug.name}: {MAX_SCHEDULES} schedules did not notice"


def test_there_are_bugs_enough() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 25
