"""Decode queue with more requests than a step can serve."""

import random

from sageLLM.runtime.scheduler.batch import Batch
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
