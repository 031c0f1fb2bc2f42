"""Decode queue with more requests than a step can serve."""

import random
from collections.abc import Sequence

from sageLLM.runtime.scheduler.batch import Batch, KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.decode_queue import DecodeQueue
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.request import Request


def test_the_growth_calendar_does_not_fill_up() -> None:
    """Regression: stale entries were entered again in every round, and multiplied."""
    scheduler = PDScheduler(PDSchedulerConfig(max_prefill_batch_size=64, max_decode_batch_size=2))
    for number in range(40):
        scheduler.add_request(Request(str(number), [1] * 5, max_new_tokens=10_000))
    most = 0
    for _ in range(600):
        output = scheduler.schedule()
        for batch in (output.prefill_batch, output.decode_batch):
            for chunk in batch.chunks if batch else ():
                chunk.request.output_token_ids.append(0)
        scheduler.update_after_step([])
        most = max(most, *(len(slots) for slots in scheduler._state.decodes._growth.values()))
    assert most <= 40 * 16, "each of 40 requests at most once per tick of a block"


def test_requests_join_and_leave_in_any_order() -> None:
    """Chunks start where each request is, and a batch handed out does not change when others join or leave."""
    scheduler = PDScheduler(PDSchedulerConfig(mode="hybrid"))
    rng = random.Random(5)
    kept: list[tuple[Batch, list[str]]] = []
    for number in range(120):
        if rng.random() < 0.6:
            scheduler.add_request(Request(str(number), [1] * rng.randint(1, 9), max_new_tokens=10_000))
        output = scheduler.schedule()
        batches = [batch for batch in (output.prefill_batch, output.decode_batch) if batch]
        last = [chunk for batch in batches for chunk in batch.chunks if chunk.is_last]
        assert all(chunk.start + chunk.num_tokens == chunk.request.total_tokens for chunk in last)
        for chunk in last:
            chunk.request.output_token_ids.append(0)
        if output.decode_batch:
            kept.append((output.decode_batch, [r.request_id for r in output.decode_batch.requests]))
        scheduler.update_after_step([c.request.request_id for c in last if rng.random() < 0.2])
        assert [r.request_id for r in scheduler.decode_queue] == _decoding(scheduler)
    assert all([r.request_id for r in batch.requests] == names for batch, names in kept)


def _decoding(scheduler: PDScheduler) -> list[str]:
    return [request.request_id for request in scheduler.running_requests.values() if request.slot is not None]


def test_a_request_grows_by_one_block_after_a_roll_back() -> None:
    """Regression: a skipped request whose step was rolled back was entered twice for its growth."""
    config = PDSchedulerConfig(max_prefill_batch_size=2, max_decode_batch_size=1)
    scheduler = PDScheduler(config, kv_budget=KVBudget(16, block_size=4))
    one, other = Request("one", [1]), Request("other", [2] * 2)
    scheduler.add_request(one)
    scheduler.add_request(other)
    step(scheduler)
    scheduler.schedule()  # of one request, by turns
    scheduler.rollback_step()
    scheduler.check_integrity()
    step(scheduler, finished=["one"])
    while len(other.kv_block_ids) < 3:
        grown = step(scheduler).kv_blocks_to_allocate
        assert len(grown.get("other", ())) <= 1
        assert len(other.kv_block_ids) == -(-other.num_computed_tokens // 4)


def test_a_skipped_request_continues_where_it_was() -> None:
    queue = DecodeQueue(4, SequenceLimits(None, None, 4))
    one, other = Request("one", [1] * 3, num_computed_tokens=3), Request("other", [1] * 7, num_computed_tokens=7)
    for request in (one, other):
        request.kv_block_ids = [0, 1, 2, 3]
        queue.join(request, ())
    starts = [queue.advance(skipped) for skipped in ({}, {"one": one.slot}, {"one": one.slot}, {})]
    chunks = [[(chunk.request.request_id, chunk.start) for chunk in plan.batch.chunks] for plan in starts if plan]
    assert chunks == [
        [("one", 3), ("other", 7)],
        [("other", 8)],
        [("other", 9)],
        [("one", 4), ("other", 10)],
    ]
    queue.check_integrity()


def test_an_ended_request_is_not_kept_until_its_latest_end() -> None:
    scheduler = PDScheduler(PDSchedulerConfig())
    scheduler.add_request(Request("a", [1] * 3, max_new_tokens=10**6))
    step(scheduler)
    step(scheduler)
    assert len(scheduler._state.decodes._ends) == 1
    step(scheduler, finished=["a"])
    assert not scheduler._state.decodes._ends


def step(scheduler: PDScheduler, finished: Sequence[str] = ()) -> ScheduleOutput:
    """Plan and commit a step in which each request gets a token."""
    output = scheduler.schedule()
    for batch in (output.prefill_batch, output.decode_batch):
        for chunk in batch.chunks if batch else ():
            chunk.request.output_token_ids.append(0)
    scheduler.update_after_step(finished)
    return output
