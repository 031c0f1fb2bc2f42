"""Decode queue with more requests than a step can serve."""

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
