"""Planning ahead, workers of strict mode that step at their own pace, and received KV."""

import pytest

from sageLLM.runtime.scheduler.base import KVBudget, Request, RequestStatus
from sageLLM.runtime.scheduler.modes import ModeChoice
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig

MODES = ["time_share", "hybrid", "strict"]


def make(fake_engine, mode="time_share", num_blocks=None, block_size=4, **config):
    budget = None if num_blocks is None else KVBudget(num_blocks, block_size)
    return fake_engine(PDScheduler(PDSchedulerConfig(mode=mode, **config), kv_budget=budget))


def run_ahead(engine, max_steps=500) -> None:
    """Plan each step before the previous one has run."""
    out = engine.plan()
    for _ in range(max_steps):
        ahead = engine.plan(is_ahead=True)
        engine.commit(out, engine.run(out))
        out = ahead
        if not (engine.scheduler.running_requests or engine.scheduler.waiting_queue):
            engine.commit(out, engine.run(out))
            return
    raise AssertionError(f"not done: {engine.scheduler.get_stats()}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_blocks", [None, 8])
def test_steps_planned_ahead_produce_the_same_tokens(fake_engine, mode, num_blocks) -> None:
    engine = make(fake_engine, mode, num_blocks, max_prefill_tokens=12, prefill_chunk_size=8)
    requests = [engine.add(f"r{i}", 3 + 4 * i, num_outputs=1 + 2 * i) for i in range(5)]
    run_ahead(engine)
    assert engine.ends == {f"r{i}": 1 for i in range(5)}
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)
    assert engine.scheduler.get_stats()["kv_blocks_used"] == 0


def test_a_decode_is_planned_before_its_token_is_known(fake_engine) -> None:
    engine = make(fake_engine)
    request = engine.add("a", 5)
    first = engine.plan()
    second = engine.plan(is_ahead=True)
    assert [(c.start, c.num_tokens, c.is_last) for c in second.decode_batch.chunks] == [(5, 1, True)]
    assert (request.num_computed_tokens, request.num_planned_tokens, request.num_output_tokens) == (0, 6, 0)
    engine.commit(first, engine.run(first))
    assert (request.status, request.num_computed_tokens) == (RequestStatus.DECODING, 5)


def test_a_request_that_ends_by_length_is_not_planned_ahead(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("one", 5, num_outputs=1, max_new_tokens=1)
    engine.add("two", 5, num_outputs=2, max_new_tokens=2)
    first = engine.plan()
    second = engine.plan(is_ahead=True)
    assert [c.request.request_id for c in second.decode_batch.chunks] == ["two"]
    engine.commit(first, engine.run(first))
    assert engine.plan(is_ahead=True).is_empty


def test_blocks_of_a_stopped_request_are_freed_after_the_step_planned_ahead(fake_engine) -> None:
    engine = make(fake_engine, num_blocks=8)
    engine.add("a", 5, num_outputs=1)
    first = engine.plan()
    second = engine.plan(is_ahead=True)
    engine.commit(first, engine.run(first))
    assert engine.ends == {"a": 1}
    assert engine.scheduler.get_stats()["kv_blocks_used"] == 2
    engine.commit(second, engine.run(second))
    assert engine.scheduler.get_stats()["kv_blocks_used"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_step_planned_ahead_can_be_rolled_back(fake_engine, mode) -> None:
    engine = make(fake_engine, mode, 12, max_prefill_tokens=8, prefill_chunk_size=4)
    requests = [engine.add(f"r{i}", 3 + 3 * i, num_outputs=6) for i in range(4)]
    for _ in range(200):
        out = engine.plan()
        engine.plan(is_ahead=True)
        engine.scheduler.rollback_ahead()
        engine.scheduler.check_integrity()
        engine.commit(out, engine.run(out))
        if not engine.scheduler.running_requests:
            break
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)
    assert engine.ends == {f"r{i}": 1 for i in range(4)}


@pytest.mark.parametrize("mode", MODES)
def test_a_failing_device_rolls_back_both_steps(fake_engine, mode) -> None:
    engine = make(fake_engine, mode, 12, max_prefill_tokens=8, prefill_chunk_size=4)
    requests = [engine.add(f"r{i}", 3 + 3 * i, num_outputs=6) for i in range(4)]
    for _ in range(200):
        engine.plan()
        engine.plan(is_ahead=True)
        engine.scheduler.rollback_step()
        engine.scheduler.check_integrity()
        engine.step()
        if not engine.scheduler.running_requests:
            break
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)


def test_only_one_step_is_planned_ahead(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("a", 5)
    engine.plan()
    engine.plan(is_ahead=True)
    with pytest.raises(RuntimeError, match="at most 1 steps can be pending, got 2"):
        engine.scheduler.plan_ahead()


def test_a_late_token_of_a_victim_is_kept(fake_engine) -> None:
    engine = make(fake_engine, "hybrid", num_blocks=4)
    first, second = engine.add("first", 7, num_outputs=8), engine.add("second", 7, num_outputs=8)
    out = engine.plan()
    while True:
        ahead = engine.plan(is_ahead=True)
        if ahead.preempted_requests:
            break
        engine.commit(out, engine.run(out))
        out = ahead
    num_known = second.num_output_tokens
    engine.commit(out, engine.run(out))
    assert (second.status, second.num_output_tokens) == (RequestStatus.PREEMPTED, num_known + 1)
    engine.commit(ahead, engine.run(ahead))
    engine.run_to_end()
    assert all(r.output_token_ids == engine.expected_output(r) for r in (first, second))


def test_the_workers_of_strict_mode_step_at_their_own_pace(fake_engine) -> None:
    engine = make(fake_engine, "strict", 40, max_prefill_tokens=8)
    a, long = engine.add("a", 6, num_outputs=20), engine.add("long", 60)
    for _ in range(2):
        out = engine.plan(role="prefill")
        engine.commit(out, engine.run(out))
    slow = engine.plan(role="prefill")
    assert slow.prefill_batch.total_tokens == 8
    for _ in range(5):
        out = engine.plan(role="decode")
        assert (out.stage, out.kv_migrations) == ("decode", [])
        engine.commit(out, engine.run(out))
    assert a.num_output_tokens == 6
    engine.commit(slow, engine.run(slow))
    assert long.num_computed_tokens == 18
    while engine.scheduler.running_requests:
        for role in ("prefill", "decode"):
            out = engine.plan(role=role)
            engine.commit(out, engine.run(out))
    assert all(r.output_token_ids == engine.expected_output(r) for r in (a, long))


def test_a_prefill_in_a_step_of_its_worker_is_not_a_victim(fake_engine) -> None:
    engine = make(fake_engine, "strict", 5)
    first = engine.add("first", 7, num_outputs=9)
    for role in ("prefill", "prefill"):
        out = engine.plan(role=role)
        engine.commit(out, engine.run(out))
    engine.add("late", 7, num_outputs=2)
    slow = engine.plan(role="prefill")
    for _ in range(12):
        out = engine.plan(role="decode")
        assert not out.preempted_requests
        engine.commit(out, engine.run(out))
    assert first.num_output_tokens < 9  # it is skipped until the other one can be preempted
    engine.commit(slow, engine.run(slow))
    engine.run_to_end()
    assert engine.ends == {"first": 1, "late": 1}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_death_of_one_worker_rolls_back_the_step_of_both(fake_engine, role) -> None:
    engine = make(fake_engine, "strict")
    engine.add("a", 6)
    engine.step()
    engine.add("b", 5)
    engine.plan()
    engine.scheduler.lose_kv(role)
    assert not engine.scheduler._steps.pending
    engine.scheduler.check_integrity()


def test_a_step_is_committed_once() -> None:
    scheduler = PDScheduler(PDSchedulerConfig())
    with pytest.raises(ValueError) as error:
        scheduler.update_after_step([], step_id=3)
    assert str(error.value) == "step_id must be that of a pending step, got 3: committed or rolled back already"


def test_a_received_request_decodes_at_once() -> None:
    scheduler = PDScheduler(PDSchedulerConfig(), kv_budget=KVBudget(8, 4))
    request = Request("a", [1] * 6, output_token_ids=[5], num_computed_tokens=6)
    scheduler.add_received(request)
    out = scheduler.schedule()
    assert out.kv_blocks_to_allocate == {"a": [0, 1]}
    assert [(c.start, c.num_tokens) for c in out.decode_batch.chunks] == [(6, 1)]
    scheduler.update_after_step([])
    assert request.num_computed_tokens == 7


def test_a_received_request_must_have_all_tokens_but_the_newest_computed() -> None:
    scheduler = PDScheduler(PDSchedulerConfig())
    with pytest.raises(ValueError) as error:
        scheduler.add_received(Request("a", [1] * 6, output_token_ids=[5], num_computed_tokens=4))
    expected = "expected all tokens of received request 'a' but the newest output token to be computed, got 4 of 7"
    assert str(error.value) == expected


def test_decodes_respect_the_bound_on_context(fake_engine) -> None:
    engine = make(fake_engine, max_decode_context_tokens=40)
    requests = [engine.add(f"r{i}", 15, num_outputs=12) for i in range(4)]
    while engine.scheduler.running_requests or engine.scheduler.waiting_queue:
        out = engine.step()
        if out.decode_batch:
            assert sum(c.start + 1 for c in out.decode_batch.chunks) <= 40
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)


def test_time_share_can_prefer_prefill(fake_engine) -> None:
    engine = make(fake_engine, max_consecutive_decodes=0, max_prefill_batch_size=1)
    for i in range(3):
        engine.add(f"r{i}", 4, num_outputs=9)
    assert [engine.step().stage for _ in range(4)] == ["prefill", "prefill", "prefill", "decode"]


class Alternate:
    """Chooses hybrid and time_share alternately."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.seen = []

    def observe(self, request) -> None:
        self.seen.append(request)

    def choose(self, view) -> ModeChoice:
        self.num_asked += 1
        return ModeChoice("hybrid", 3) if self.num_asked % 2 else ModeChoice("time_share")


def test_auto_chooses_every_step(fake_engine) -> None:
    chooser = Alternate()
    config = PDSchedulerConfig(mode="auto", max_consecutive_decodes=1, max_prefill_tokens=8)
    engine = fake_engine(PDScheduler(config, kv_budget=KVBudget(30, 4), mode_chooser=chooser))
    requests = [engine.add(f"r{i}", 2 + 8 * i, num_outputs=6) for i in range(4)]
    num_steps = engine.run_to_end()
    assert chooser.num_asked == num_steps and chooser.seen == requests
    assert {"hybrid", "prefill", "decode"} <= {out.stage for out in engine.steps}
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)


def test_auto_needs_a_chooser() -> None:
    with pytest.raises(ValueError) as error:
        PDScheduler(PDSchedulerConfig(mode="auto"))
    assert str(error.value) == "mode_chooser must be passed with mode 'auto', and only then"
