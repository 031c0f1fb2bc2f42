"""Interface, migration, preemption, limits and roll-back of the PD scheduler."""

import pytest

from sageLLM.runtime.scheduler.base import (
    Batch,
    Chunk,
    KVBudget,
    Request,
    RequestStatus,
    ScheduleOutput,
    SchedulerStalledError,
)
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig

MODES = ["time_share", "hybrid", "strict"]


def make(fake_engine, mode="time_share", num_blocks=None, block_size=4, max_model_len=None, **config):
    budget = None if num_blocks is None else KVBudget(num_blocks, block_size)
    config = PDSchedulerConfig(mode=mode, **config)
    return fake_engine(PDScheduler(config, kv_budget=budget, max_model_len=max_model_len))


def test_the_public_interface() -> None:
    config = PDSchedulerConfig()
    assert (config.prefill_device_ids, config.decode_device_ids, config.mode) == ([0], [0], "time_share")
    assert (config.max_prefill_batch_size, config.max_prefill_tokens, config.prefill_chunk_size) == (32, 4096, 512)
    assert (config.max_decode_batch_size, config.max_decode_tokens) == (256, 8192)
    assert (config.enable_preemption, config.preemption_mode) == (True, "recompute")
    request = Request("a", [1, 2, 3])
    assert (request.max_new_tokens, request.temperature, request.top_p, request.top_k) == (256, 1.0, 1.0, -1)
    assert (request.num_prompt_tokens, request.num_output_tokens, request.total_tokens) == (3, 0, 3)
    assert request.status is RequestStatus.WAITING
    assert request.arrival_time > 0
    batch = Batch(0, [request, Request("b", [1] * 5)])
    assert (batch.batch_size, batch.total_tokens) == (2, 8)
    out = ScheduleOutput()
    assert (out.prefill_batch, out.decode_batch, out.preempted_requests) == (None, None, [])
    assert (out.kv_blocks_to_allocate, out.kv_blocks_to_free, out.kv_migrations) == ({}, [], [])
    assert (out.stage, out.is_empty) == ("idle", True)
    scheduler = PDScheduler(config)
    keys = {"total_prefill_batches", "total_decode_batches", "total_preemptions", "prefill_queue_size"}
    assert keys | {"decode_queue_size"} <= scheduler.get_stats().keys()
    scheduler.add_request(request)
    assert request in scheduler.waiting_queue
    assert scheduler.prefill_queue == [request]
    assert (scheduler.get_num_waiting(), scheduler.get_num_running()) == (1, 0)
    assert scheduler.schedule().stage == "prefill"
    assert (scheduler.get_num_waiting(), scheduler.get_num_running()) == (0, 1)


def test_the_original_protocol_still_works() -> None:
    scheduler = PDScheduler(PDSchedulerConfig())
    scheduler.add_request(Request("a", [1, 2]))
    assert scheduler.schedule().prefill_batch is not None
    scheduler.prefill_to_decode(["a"])
    scheduler.prefill_to_decode(["a", "unknown"])
    out = scheduler.schedule()
    assert [c.num_tokens for c in out.decode_batch.chunks] == [1]
    scheduler.update_after_step(["a"])
    assert scheduler.get_num_running() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "both"}, "mode must be one of strict, time_share, hybrid, auto; got 'both'"),
        ({"preemption_mode": "drop"}, "preemption_mode must be one of swap, recompute; got 'drop'"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens must be at least 1, got 0"),
        (
            {"mode": "hybrid", "max_prefill_tokens": 1},
            "max_prefill_tokens must be at least 2 in hybrid mode (one decode and one prefill token), got 1",
        ),
    ],
)
def test_an_invalid_config_is_refused(fields, message) -> None:
    with pytest.raises(ValueError) as error:
        PDSchedulerConfig(**fields)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("prompt_len", "fields", "message"),
    [
        (
            16,
            {},
            "request 'a' needs 5 KV blocks for 16 prompt tokens and one output token; "
            "the pool has 4 blocks of 4 tokens",
        ),
        (
            12,
            {},
            "request 'a' has 12 prompt tokens; with max_model_len=12 at most 11 leave room for an output token",
        ),
        (3, {"max_new_tokens": 0}, "request 'a' asks for max_new_tokens=0; it must be at least 1"),
        (3, {"status": RequestStatus.FINISHED}, "request 'a' is finished; make a new Request to run it again"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_request_that_can_never_run_is_refused(mode, prompt_len, fields, message) -> None:
    max_model_len = 12 if "max_model_len" in message else None
    scheduler = PDScheduler(PDSchedulerConfig(mode=mode), kv_budget=KVBudget(4, 4), max_model_len=max_model_len)
    with pytest.raises(ValueError) as error:
        scheduler.add_request(Request("a", [1] * prompt_len, **fields))
    assert str(error.value) == message


@pytest.mark.parametrize("mode", MODES)
def test_the_longest_prompt_that_fits_yields_its_token(fake_engine, mode) -> None:
    engine = make(fake_engine, mode, num_blocks=4)
    request = engine.add("a", 15, num_outputs=99)
    engine.run_to_end()
    assert request.num_output_tokens == 1
    assert engine.ends == {"a": 1}


@pytest.mark.parametrize("mode", MODES)
def test_the_scheduler_ends_complete_requests_that_the_engine_does_not(fake_engine, mode) -> None:
    engine = make(fake_engine, mode, num_blocks=4, max_model_len=14)
    full = engine.add("full", 5, num_outputs=99)
    engine.run_to_end()
    assert full.total_tokens == 14
    asked = engine.add("asked", 5, num_outputs=99, max_new_tokens=3)
    while engine.scheduler.running_requests or len(engine.scheduler.waiting_queue):
        out = engine.plan()
        engine.run(out)
        engine.commit(out, [])
    assert asked.num_output_tokens == 3


def test_one_output_token_ends_at_prefill(fake_engine) -> None:
    engine = make(fake_engine)
    request = engine.add("a", 5, num_outputs=1)
    assert engine.run_to_end() == 1
    assert request.num_output_tokens == 1
    assert request.first_token_time is not None
    assert request.finish_time >= request.first_token_time


def test_times_come_from_the_injected_clock() -> None:
    ticks = iter(range(100))
    scheduler = PDScheduler(PDSchedulerConfig(), clock=lambda: float(next(ticks)))
    request = Request("a", [1], arrival_time=0.0)
    scheduler.add_request(request)
    scheduler.schedule()
    scheduler.update_after_step([])
    assert request.first_token_time == 0.0
    scheduler.schedule()
    scheduler.update_after_step(["a"])
    assert request.first_token_time == 0.0
    assert request.finish_time == 1.0


def test_time_share_alternates_and_never_mixes(fake_engine) -> None:
    engine = make(fake_engine, max_prefill_batch_size=1, max_consecutive_decodes=2)
    for i in range(5):
        engine.add(f"r{i}", 4, num_outputs=30)
    stages = [engine.step().stage for _ in range(13)]
    assert stages == ["prefill", "decode", "decode"] * 4 + ["prefill"]


def test_hybrid_adds_a_chunk_to_the_decodes(fake_engine) -> None:
    engine = make(fake_engine, "hybrid", prefill_chunk_size=8)
    engine.add("a", 4, num_outputs=9)
    engine.step()
    engine.add("b", 20)
    out = engine.step()
    assert out.stage == "hybrid"
    assert out.decode_batch.chunks == [Chunk(engine.requests["a"], 4, 1, True)]
    assert out.prefill_batch.chunks == [Chunk(engine.requests["b"], 0, 8, False)]


def test_strict_migrates_before_it_decodes(fake_engine) -> None:
    engine = make(fake_engine, "strict", num_blocks=8)
    request = engine.add("a", 6)
    out = engine.step()
    assert (out.stage, out.kv_blocks_to_allocate) == ("prefill", {"a": [0, 1]})
    out = engine.plan()
    (copy,) = out.kv_migrations
    assert (out.stage, out.is_empty) == ("idle", False)
    assert (copy.request_id, copy.num_tokens, len(copy.source_blocks)) == ("a", 6, 2)
    assert request.status is RequestStatus.PREFILLING
    engine.commit(out, engine.run(out))
    assert request.status is RequestStatus.DECODING
    assert request.kv_block_ids == copy.target_blocks
    out = engine.step()
    assert out.stage == "decode"
    assert out.prefill_blocks_to_free == copy.source_blocks


def test_blocks_of_the_prefill_pool_are_announced_as_free_once(fake_engine) -> None:
    engine = make(fake_engine, "strict", num_blocks=16)
    engine.add("a", 10, num_outputs=4)
    freed = [block for _ in range(6) for block in engine.step().prefill_blocks_to_free]
    assert engine.ends == {"a": 1}
    assert sorted(freed) == [0, 1, 2]


def test_strict_waits_for_a_copy_that_takes_several_steps(fake_engine) -> None:
    engine = make(fake_engine, "strict", num_blocks=8)
    request = engine.add("a", 6)
    engine.step()
    out = engine.plan()
    engine.run(out)
    engine.commit(out, [], pending=["a"])
    for _ in range(3):
        assert engine.step().is_empty
    assert engine.scheduler.get_stats()["prefill_kv_blocks_used"] == 2
    engine.scheduler.confirm_migrations(["a"])
    engine.scheduler.confirm_migrations(["a"])
    assert engine.scheduler.get_stats()["prefill_kv_blocks_used"] == 0
    assert engine.step().stage == "decode"
    engine.run_to_end()
    assert request.output_token_ids == engine.expected_output(request)


def test_abort_during_a_copy_keeps_both_block_tables_until_it_ends(fake_engine) -> None:
    engine = make(fake_engine, "strict", num_blocks=8)
    engine.add("a", 6)
    engine.step()
    out = engine.plan()
    assert engine.scheduler.abort_request("a")
    engine.commit(out, [], pending=["a"])
    stats = engine.scheduler.get_stats()
    assert (stats["kv_blocks_used"], stats["prefill_kv_blocks_used"], stats["num_running"]) == (2, 2, 0)
    engine.scheduler.confirm_migrations(["a"])
    stats = engine.scheduler.get_stats()
    assert (stats["kv_blocks_used"], stats["prefill_kv_blocks_used"]) == (0, 0)
    engine.scheduler.check_integrity()


def test_strict_holds_prefill_back_while_the_decode_pool_is_full(fake_engine) -> None:
    config = PDSchedulerConfig(mode="strict")
    budget = KVBudget(num_blocks=4, block_size=4, num_prefill_blocks=100)
    engine = fake_engine(PDScheduler(config, kv_budget=budget))
    engine.add("a", 11, num_outputs=3)
    blocked = engine.add("b", 11, num_outputs=3)
    for _ in range(3):
        engine.step()
        assert blocked.num_computed_tokens == 0
    engine.run_to_end()
    assert blocked.num_output_tokens == 3


def test_an_aborted_request_keeps_its_blocks_and_id_until_the_step_ends(fake_engine) -> None:
    engine = make(fake_engine, num_blocks=4)
    request = engine.add("a", 6)
    out = engine.plan()
    assert engine.scheduler.abort_request("a")
    assert engine.scheduler.get_stats()["kv_blocks_used"] == 2
    with pytest.raises(ValueError) as error:
        engine.scheduler.add_request(Request("a", [1]))
    expected = "request 'a' was aborted in a pending step; its id can be used again after that step"
    assert str(error.value) == expected
    request.output_token_ids.append(5)  # the engine was already running it
    engine.commit(out, [])
    assert (request.status, request.num_computed_tokens) == (RequestStatus.FINISHED, 0)
    assert engine.scheduler.get_stats()["kv_blocks_used"] == 0
    engine.add("a", 6)


def test_a_preempted_request_keeps_its_rank_and_emits_nothing_twice(fake_engine) -> None:
    engine = make(fake_engine, num_blocks=5)
    first = engine.add("first", 7, num_outputs=8)
    second = engine.add("second", 7, num_outputs=8)
    late = engine.add("late", 7, num_outputs=8)
    while not engine.scheduler.preempted_requests:
        out = engine.step()
    assert out.preempted_requests == [second]
    assert out.prefill_batch is None  # a preempting step admits nothing
    assert (second.status, second.kv_block_ids, second.num_computed_tokens) == (RequestStatus.PREEMPTED, [], 0)
    assert list(engine.scheduler.waiting_queue) == [second, late]
    kept = list(second.output_token_ids)
    engine.run_to_end()
    assert second.output_token_ids[: len(kept)] == kept
    assert all(r.output_token_ids == engine.expected_output(r) for r in (first, second, late))
    assert first.num_preemptions == 0
    replay = [c for out in engine.steps if out.prefill_batch for c in out.prefill_batch.chunks if c.request is second][
        -1
    ]
    assert (replay.start, replay.num_tokens, replay.is_last) == (4, 3 + len(kept), True)  # its first block is cached


def test_a_victim_in_the_plan_returns_its_blocks(fake_engine) -> None:
    """Both need a block in one step: `low` takes the last one first, and `high` preempts it."""
    engine = make(fake_engine, num_blocks=7, max_consecutive_decodes=1)
    low = engine.add("low", 7, num_outputs=15, priority=1)
    engine.step()
    high = engine.add("high", 8, num_outputs=15, priority=0)
    while not engine.scheduler.preempted_requests:
        low_blocks = list(low.kv_block_ids)
        out = engine.step()
    assert out.preempted_requests == [low]
    assert [c.request for c in out.decode_batch.chunks] == [high]
    assert out.kv_blocks_to_allocate.keys() == {"high"}
    assert out.kv_blocks_to_free == low_blocks  # without the block that it held only while the step was planned
    engine.run_to_end()


def test_a_preempting_step_admits_nothing(fake_engine) -> None:
    bounds = {"max_prefill_batch_size": 2, "max_decode_batch_size": 2}  # no slot until the victim leaves
    engine = make(fake_engine, "hybrid", num_blocks=6, **bounds)
    engine.add("first", 7, num_outputs=9)
    engine.add("second", 14, num_outputs=9)
    engine.step()
    small = engine.add("small", 2, priority=-1)
    while not engine.scheduler.preempted_requests:
        out = engine.step()
    assert out.preempted_requests == [engine.requests["second"]]
    assert small.status is RequestStatus.WAITING
    engine.step()
    assert small.status is not RequestStatus.WAITING


def test_a_preempted_request_does_not_return_to_be_preempted_again(fake_engine) -> None:
    """`brief` ends when `victim` is preempted, which leaves just enough blocks for it; but `first` still grows."""
    engine = make(fake_engine, "hybrid", num_blocks=5, prefill_chunk_size=2)
    engine.add("first", 7, num_outputs=9)
    engine.add("brief", 2, num_outputs=3)
    victim = engine.add("victim", 5, num_outputs=9)
    engine.run_to_end()
    assert victim.num_preemptions == 1
    assert victim.output_token_ids == engine.expected_output(victim)


def test_a_decode_is_skipped_rather_than_preempted_for_a_copy_of_lower_rank(fake_engine) -> None:
    engine = make(fake_engine, "strict", num_blocks=4)
    first = engine.add("first", 3, num_outputs=9)
    engine.step()
    engine.add("copied", 11, num_outputs=2)
    engine.step()
    out = engine.plan()
    assert [copy.request_id for copy in out.kv_migrations] == ["copied"]
    engine.commit(out, engine.run(out), pending=["copied"])
    out = engine.step()
    assert out.is_empty
    assert (first.status, first.num_preemptions) == (RequestStatus.DECODING, 0)
    engine.scheduler.confirm_migrations(["copied"])
    assert engine.step().preempted_requests == [engine.requests["copied"]]
    engine.run_to_end()
    assert engine.ends == {"first": 1, "copied": 1}


def test_a_rolled_back_admission_that_migrates_next_announces_only_its_target_blocks(fake_engine) -> None:
    engine = make(fake_engine, "strict", num_blocks=8)
    engine.add("other", 4)
    engine.add("a", 6)
    engine.run(engine.plan())
    engine.scheduler.prefill_to_decode(["a"])
    out = engine.plan()
    (copy,) = out.kv_migrations
    assert out.kv_blocks_to_allocate["a"] == copy.target_blocks


def test_a_lower_priority_value_goes_first(fake_engine) -> None:
    engine = make(fake_engine, max_prefill_batch_size=1)
    for name, priority in [("c", 2), ("a", 0), ("b", 1), ("a2", 0)]:
        engine.add(name, 4, num_outputs=1, priority=priority)
    engine.run_to_end()
    assert list(engine.ends) == ["a", "a2", "b", "c"]


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_step_is_planned_again(fake_engine, mode) -> None:
    engine = make(fake_engine, mode, num_blocks=30, max_prefill_tokens=8, prefill_chunk_size=8)
    requests = [engine.add(f"r{i}", 11, num_outputs=6) for i in range(5)]
    for _ in range(60):
        engine.plan()  # and the device fails
        engine.scheduler.rollback_step()
        engine.scheduler.check_integrity()
        engine.step()
    assert engine.ends == {f"r{i}": 1 for i in range(5)}
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)


def test_a_step_that_plans_nothing_while_requests_wait_is_noticed() -> None:
    scheduler = PDScheduler(kv_budget=KVBudget(num_blocks=2))
    scheduler.kv.decode.pool.take(2)  # blocks that no request will ever free
    assert scheduler.schedule().is_empty  # no request waits
    scheduler.add_request(Request("a", [1]))
    with pytest.raises(SchedulerStalledError, match=r"^nothing planned although requests wait: "):
        scheduler.schedule()


def test_the_integrity_check_notices_a_request_in_no_phase(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("a", 4)
    engine.step()
    engine.scheduler.decode_queue.remove(engine.requests["a"])
    with pytest.raises(AssertionError, match=r"running requests in no phase: \{'a'\}"):
        engine.scheduler.check_integrity()


def test_a_step_with_all_decodes_preempted_continues_with_prefill(fake_engine) -> None:
    """The only decode outgrows the pool next to a prefill that ranks before it: the prefill gets the step."""
    engine = make(fake_engine, num_blocks=10, block_size=5, max_prefill_tokens=4, max_consecutive_decodes=1)
    victim = engine.add("victim", 20, num_outputs=7)
    for _ in range(7):
        engine.step()
    engine.add("urgent", 21, num_outputs=1, priority=-1)
    while not engine.scheduler.preempted_requests:
        out = engine.step()
    assert out.preempted_requests == [victim]
    assert out.decode_batch is None
    assert set(out.num_scheduled_tokens) == {"urgent"}
    engine.run_to_end()
    assert victim.output_token_ids == engine.expected_output(victim)
