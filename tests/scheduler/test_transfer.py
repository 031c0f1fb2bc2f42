"""KV transfer between the workers of strict mode: states, pieces, acknowledgements, failures, deaths."""

import pytest

from sageLLM.runtime.scheduler.base import KVBudget, RequestStatus
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.transfer import Transfer, TransferConfig, TransferEvent, TransferState


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(fake_engine, clock=None, num_blocks=12, chunk=8, **transfer):
    config = PDSchedulerConfig(mode="strict", max_prefill_tokens=chunk, transfer=TransferConfig(**transfer))
    scheduler = PDScheduler(config, kv_budget=KVBudget(num_blocks, 4), clock=clock or Clock())
    return fake_engine(scheduler)


def step_without_acknowledgement(engine):
    out = engine.plan()
    engine.commit(out, engine.run(out), pending=[m.request_id for m in out.kv_migrations])
    return out


def is_empty(engine) -> bool:
    stats = engine.scheduler.get_stats()
    return stats["kv_blocks_used"] == stats["prefill_kv_blocks_used"] == 0


def test_a_request_goes_through_the_states_in_order(fake_engine) -> None:
    engine = make(fake_engine)
    scheduler = engine.scheduler
    engine.add("a", 12, num_outputs=3)
    seen = [scheduler.transfer_state("a")]
    for _ in range(3):
        step_without_acknowledgement(engine)
        seen.append(scheduler.transfer_state("a"))
    scheduler.confirm_migrations(["a"])
    seen.append(scheduler.transfer_state("a"))
    engine.run_to_end()
    seen.append(scheduler.transfer_state("a"))
    states = [s and s.value for s in seen]
    assert states == ["queued", "prefilling", "sending", "sending", "decoding", None]


def test_full_blocks_are_sent_while_later_chunks_are_computed(fake_engine) -> None:
    engine = make(fake_engine, chunk=6)
    request = engine.add("a", 15, num_outputs=3)
    outs = [engine.step() for _ in range(4)]
    pieces = [[(m.start, m.num_tokens, len(m.source_blocks)) for m in out.kv_migrations] for out in outs]
    assert pieces == [[], [(0, 4, 1)], [(4, 8, 2)], [(12, 3, 1)]]
    assert [out.stage for out in outs] == ["prefill", "prefill", "prefill", "idle"]
    engine.run_to_end()
    assert request.output_token_ids == engine.expected_output(request)


def test_without_streaming_all_blocks_are_sent_at_the_end(fake_engine) -> None:
    engine = make(fake_engine, chunk=6, stream=False)
    engine.add("a", 15)
    outs = [engine.step() for _ in range(4)]
    assert [len(out.kv_migrations) for out in outs] == [0, 0, 0, 1]
    assert outs[3].kv_migrations[0].num_tokens == 15


def test_the_gate_opens_with_the_last_layer_of_the_last_rank_in_any_order(fake_engine) -> None:
    engine = make(fake_engine, chunk=8, num_ranks=2, num_layers=2)
    request, scheduler = engine.add("a", 12, num_outputs=3), engine.scheduler
    for _ in range(3):
        step_without_acknowledgement(engine)
    for start, rank, layers in [(8, 0, [1]), (0, 1, None), (8, 0, [1]), (8, 1, None), (0, 0, [1, 0])]:
        scheduler.acknowledge_migration("a", start, 0, rank, layers)
        assert request.status is RequestStatus.PREFILLING
        assert scheduler.schedule().decode_batch is None
        scheduler.update_after_step([])
    scheduler.acknowledge_migration("a", 8, 0, 0, [0])
    assert request.status is RequestStatus.DECODING
    scheduler.acknowledge_migration("a", 8, 0, 0, [0])
    scheduler.check_integrity()
    engine.run_to_end()
    assert request.output_token_ids == engine.expected_output(request)


def test_an_acknowledgement_of_an_earlier_attempt_is_dropped(fake_engine) -> None:
    engine = make(fake_engine)
    request, scheduler = engine.add("a", 6), engine.scheduler
    for _ in range(2):
        step_without_acknowledgement(engine)
    scheduler.fail_migrations(["a"])
    (again,) = step_without_acknowledgement(engine).kv_migrations
    assert (again.start, again.num_tokens, again.attempt) == (0, 6, 1)
    scheduler.acknowledge_migration("a", 0, 0)
    assert request.status is RequestStatus.PREFILLING
    scheduler.acknowledge_migration("a", 0, 1)
    assert request.status is RequestStatus.DECODING


def test_an_acknowledgement_from_before_a_recomputation_is_dropped(fake_engine) -> None:
    engine = make(fake_engine, max_attempts=1)
    request, scheduler = engine.add("a", 6), engine.scheduler
    for _ in range(2):
        (lost,) = step_without_acknowledgement(engine).kv_migrations or [None]
    scheduler.fail_migrations(["a"])  # the only attempt: recomputed
    engine.victims["a"] = 0
    for _ in range(2):
        (again,) = step_without_acknowledgement(engine).kv_migrations or [None]
    assert (lost.start, lost.num_tokens, again.start, again.num_tokens) == (0, 6, 0, 7)
    scheduler.acknowledge_migration("a", lost.start, lost.attempt)
    assert request.status is RequestStatus.PREFILLING
    scheduler.acknowledge_migration("a", again.start, again.attempt)
    assert request.status is RequestStatus.DECODING


def test_a_failure_withdraws_the_copy_planned_ahead(fake_engine) -> None:
    """Begun after its block was sent again, it would overwrite a token decoded since."""
    engine = make(fake_engine, chunk=4)
    engine.add("a", 6)
    scheduler = engine.scheduler
    for _ in range(2):
        step_without_acknowledgement(engine)
    out = engine.plan()
    ahead = engine.plan(is_ahead=True)
    assert [piece.start for piece in out.kv_migrations + ahead.kv_migrations] == [4]
    scheduler.fail_migrations(["a"])
    assert out.kv_migrations == ahead.kv_migrations == []
    for output in (out, ahead):
        engine.commit(output, engine.run(output))
    (again,) = engine.plan().kv_migrations
    assert (again.start, again.num_tokens) == (0, 6)


def test_the_death_of_the_decode_worker_withdraws_copies_of_a_pending_step(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("a", 6)
    scheduler = engine.scheduler
    out = engine.plan(role="prefill")
    engine.commit(out, engine.run(out))
    out = engine.plan(role="prefill")
    assert [piece.start for piece in out.kv_migrations] == [0]
    scheduler.lose_kv("decode")
    assert out.kv_migrations == []
    engine.commit(out, engine.run(out))
    (again,) = engine.plan(role="prefill").kv_migrations
    assert (again.start, again.num_tokens) == (0, 6)


def test_after_too_many_failures_the_prompt_is_recomputed(fake_engine) -> None:
    engine = make(fake_engine, max_attempts=2)
    request, scheduler = engine.add("a", 6, num_outputs=3), engine.scheduler
    for _ in range(2):
        step_without_acknowledgement(engine)
    scheduler.fail_migrations(["a"])
    step_without_acknowledgement(engine)
    scheduler.fail_migrations(["a", "unknown"])
    assert (request.status, scheduler.transfer_state("a")) == (RequestStatus.PREEMPTED, TransferState.QUEUED)
    assert is_empty(engine)
    engine.victims["a"] = 0
    engine.run_to_end()
    assert request.output_token_ids == engine.expected_output(request)
    assert engine.ends == {"a": 1}


def test_an_expired_lease_frees_nothing_before_the_transport_answers(fake_engine) -> None:
    clock = Clock()
    engine = make(fake_engine, clock, lease_s=5.0)
    request, scheduler = engine.add("a", 6, num_outputs=3), engine.scheduler
    for _ in range(2):
        step_without_acknowledgement(engine)
    clock.now = 4.9
    assert step_without_acknowledgement(engine).migrations_to_cancel == []
    clock.now = 5.0
    (late,) = step_without_acknowledgement(engine).migrations_to_cancel
    assert (late.request_id, late.start, late.attempt) == ("a", 0, 0)
    assert step_without_acknowledgement(engine).migrations_to_cancel == []  # reported once
    assert not is_empty(engine)
    scheduler.fail_migrations(["a"])
    engine.run_to_end()
    assert request.output_token_ids == engine.expected_output(request)


def test_an_arrival_after_the_lease_is_accepted(fake_engine) -> None:
    clock = Clock()
    engine = make(fake_engine, clock, lease_s=5.0)
    request = engine.add("a", 6, num_outputs=3)
    for _ in range(2):
        step_without_acknowledgement(engine)
    clock.now = 9.0
    assert step_without_acknowledgement(engine).migrations_to_cancel
    engine.scheduler.confirm_migrations(["a"])
    engine.run_to_end()
    assert request.output_token_ids == engine.expected_output(request)


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("transport", ["confirm", "fail"])
def test_abort_in_every_state_leaks_nothing(fake_engine, num_steps, transport) -> None:
    """After 0 steps it is queued, then prefilling (twice, with a piece in flight), sending, decoding."""
    engine = make(fake_engine)
    engine.add("a", 20, num_outputs=9)
    scheduler = engine.scheduler
    for step in range(num_steps):
        step_without_acknowledgement(engine)
        if step == 4:
            scheduler.confirm_migrations(["a"])
    was_in_flight = 2 <= num_steps < 5
    assert scheduler.abort_request("a")
    scheduler.check_integrity()
    assert is_empty(engine) != was_in_flight
    if transport == "confirm":
        scheduler.confirm_migrations(["a"])
    else:
        scheduler.fail_migrations(["a"])
    assert is_empty(engine)
    scheduler.check_integrity()
    assert scheduler.schedule().is_empty


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("ends_by", ["failure", "lease"])
def test_failure_and_lease_in_every_state_cost_only_a_copy(fake_engine, num_steps, ends_by) -> None:
    """In the same states as above: pieces in flight are sent again, and nothing else changes."""
    clock = Clock()
    engine = make(fake_engine, clock, lease_s=5.0)
    request, scheduler = engine.add("a", 20, num_outputs=9), engine.scheduler
    for step in range(num_steps):
        step_without_acknowledgement(engine)
        if step == 4:
            scheduler.confirm_migrations(["a"])
    was_in_flight = 2 <= num_steps < 5
    if ends_by == "lease":
        clock.now = 5.0
        late = step_without_acknowledgement(engine).migrations_to_cancel
        assert bool(late) == was_in_flight
    scheduler.fail_migrations(["a"])
    scheduler.check_integrity()
    engine.run_to_end()
    attempts = {piece.attempt for out in engine.steps for piece in out.kv_migrations if piece.start == 0}
    assert (1 in attempts) == (was_in_flight or (ends_by == "lease" and num_steps == 1))
    assert request.output_token_ids == engine.expected_output(request)
    assert (engine.ends, request.num_preemptions) == ({"a": 1}, 0)
    assert is_empty(engine)


@pytest.mark.parametrize("role", ["prefill", "decode", None])
@pytest.mark.parametrize("num_steps", range(8))
def test_a_dead_worker_loses_work_but_no_request(fake_engine, role, num_steps) -> None:
    engine = make(fake_engine, num_blocks=30)
    requests = [engine.add(f"r{i}", 5 + 6 * i, num_outputs=4) for i in range(4)]
    scheduler = engine.scheduler
    for _ in range(num_steps):
        step_without_acknowledgement(engine)
        scheduler.confirm_migrations(["r0", "r1"])
    engine.plan()
    scheduler.lose_kv(role)
    scheduler.check_integrity()
    if role != "prefill":
        engine.decode_cache.clear()
    if role != "decode":
        engine.prefill_cache.clear()
    engine.victims.update({r.request_id: 0 for r in scheduler.preempted_requests.values()})
    engine.run_to_end()
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)
    assert engine.ends == {f"r{i}": 1 for i in range(4)}
    assert is_empty(engine)


@pytest.mark.parametrize("mode", ["time_share", "hybrid"])
def test_a_dead_worker_of_one_pool_recomputes_everything(fake_engine, mode) -> None:
    engine = fake_engine(PDScheduler(PDSchedulerConfig(mode=mode, max_prefill_tokens=8), kv_budget=KVBudget(30, 4)))
    requests = [engine.add(f"r{i}", 5 + 6 * i, num_outputs=4) for i in range(4)]
    for _ in range(5):
        engine.step()
    engine.plan()
    engine.scheduler.lose_kv()
    assert engine.scheduler.get_stats()["kv_blocks_used"] == 0
    engine.decode_cache.clear()
    engine.victims.update({r.request_id: 0 for r in engine.scheduler.preempted_requests.values()})
    engine.run_to_end()
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)


def test_prefill_does_not_run_ahead_of_decode_space(fake_engine) -> None:
    engine = make(fake_engine, num_blocks=6)
    engine.add("a", 14, num_outputs=4)
    late = engine.add("b", 14, num_outputs=4)
    while "a" in engine.scheduler.running_requests or "a" in engine.scheduler.waiting_queue:
        engine.step()
        assert late.num_computed_tokens == 0 or "a" in engine.ends
    engine.run_to_end()
    assert engine.ends == {"a": 1, "b": 1}


def test_an_event_not_allowed_in_the_state_is_an_error() -> None:
    transfer = Transfer(Request("a", [1]), attempt=0)
    with pytest.raises(RuntimeError) as error:
        transfer.on(TransferEvent.START)
    assert str(error.value) == "'a' is queued: start cannot happen"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lease_s": 0.0}, "lease_s must be above 0, got 0.0"),
        ({"max_attempts": 0}, "max_attempts must be at least 1, got 0"),
    ],
)
def test_an_invalid_transfer_config_is_refused(fields, message) -> None:
    with pytest.raises(ValueError) as error:
        TransferConfig(**fields)
    assert str(error.value) == message
