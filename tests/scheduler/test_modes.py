"""Exact token budgets of the modes, at small sizes and at sizes in use."""

import pytest

from sageLLM.runtime.scheduler.base import KVBudget, Request, ScheduleOutput
from sageLLM.runtime.scheduler.modes import ModeChoice, SchedulerView
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig


def add(scheduler: PDScheduler, name: str, prompt_len: int, max_new_tokens: int = 10**9) -> Request:
    request = Request(name, [len(name)] * prompt_len, max_new_tokens=max_new_tokens)
    scheduler.add_request(request)
    return request


def step(scheduler: PDScheduler) -> ScheduleOutput:
    """Run one step; nothing ends."""
    out = scheduler.schedule()
    for batch in (out.prefill_batch, out.decode_batch):
        for chunk in batch.chunks if batch else ():
            if chunk.is_last:
                chunk.request.output_token_ids.append(0)
    scheduler.update_after_step([])
    return out


def prompt_tokens(out: ScheduleOutput) -> list[int]:
    return [chunk.num_tokens for chunk in out.prefill_batch.chunks] if out.prefill_batch else []


def num_decodes(out: ScheduleOutput) -> int:
    return len(out.decode_batch.requests) if out.decode_batch else 0


class Fixed:
    """Mode chooser that always chooses the same."""

    def __init__(self, choice: ModeChoice) -> None:
        self.choice = choice

    def observe(self, request: Request) -> None:
        pass

    def choose(self, view: SchedulerView) -> ModeChoice:
        return self.choice


def test_decodes_of_hybrid_leave_tokens_for_a_prompt() -> None:
    """20 decodes could use every token of a step of 8: half of them are kept for the prompt, so it takes 3 steps."""
    config = PDSchedulerConfig(mode="hybrid", max_prefill_tokens=8, prefill_chunk_size=8, enable_prefix_caching=False)
    scheduler = PDScheduler(config)
    for i in range(20):
        add(scheduler, f"d{i}", 1)
    for _ in range(4):
        step(scheduler)
    assert len(scheduler.decode_queue) == 20
    prompt = add(scheduler, "prompt", 12)
    outs = [step(scheduler) for _ in range(3)]
    assert [(prompt_tokens(out), num_decodes(out)) for out in outs] == [([4], 4)] * 3
    assert prompt.num_output_tokens == 1


def test_a_small_chunk_size_leaves_the_rest_to_the_decodes() -> None:
    config = PDSchedulerConfig(mode="hybrid", max_prefill_tokens=8, prefill_chunk_size=2, enable_prefix_caching=False)
    scheduler = PDScheduler(config)
    for i in range(20):
        add(scheduler, f"d{i}", 1)
    for _ in range(10):
        step(scheduler)
    assert len(scheduler.decode_queue) == 20
    add(scheduler, "prompt", 12)
    out = step(scheduler)
    assert (prompt_tokens(out), num_decodes(out)) == ([2], 6)


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        # the first three prompts start together; 3 decodes run with the rest of the long one
        ("hybrid", [[512], [512], [512], [464, 48], [512], [440]]),
        ("time_share", [[2000, 96], [904]]),
        ("strict", [[2000, 96], [904]]),
    ],
)
def test_chunks_have_exactly_the_configured_size(mode, sizes) -> None:
    config = PDSchedulerConfig(
        mode=mode, max_prefill_tokens=2096, prefill_chunk_size=512, max_consecutive_decodes=0
    )  # time_share: prefill first
    scheduler = PDScheduler(config)
    add(scheduler, "a", 2000)
    add(scheduler, "bb", 1000)
    found = [prompt_tokens(step(scheduler)) for _ in sizes]
    assert found == sizes
    assert prompt_tokens(step(scheduler)) == []


def test_decodes_of_hybrid_leave_no_tokens_for_a_prompt_that_cannot_run() -> None:
    config = PDSchedulerConfig(mode="hybrid", max_prefill_tokens=8, prefill_chunk_size=8, enable_prefix_caching=False)
    scheduler = PDScheduler(config, kv_budget=KVBudget(12, block_size=16))
    for number in range(8):
        add(scheduler, str(number), 1)
        step(scheduler)
    assert [num_decodes(step(scheduler)) for _ in range(3)] == [8, 8, 8], "with no prompt"
    add(scheduler, "large", 100)
    assert [num_decodes(step(scheduler)) for _ in range(3)] == [8, 8, 8], "with a prompt that finds no blocks"


def test_decodes_count_in_the_budget_of_a_hybrid_step() -> None:
    config = PDSchedulerConfig(mode="hybrid", max_prefill_tokens=100, prefill_chunk_size=100)
    scheduler = PDScheduler(config)
    for i in range(30):
        add(scheduler, f"d{i:0{i + 1}}", 1)
    step(scheduler)
    add(scheduler, "prompt", 300)
    assert prompt_tokens(step(scheduler)) == [70]


def test_time_share_gives_prefill_a_step_after_so_many_decodes() -> None:
    scheduler = PDScheduler(PDSchedulerConfig(max_consecutive_decodes=3, max_prefill_batch_size=1))
    add(scheduler, "a", 4)
    step(scheduler)
    step(scheduler)
    for name in ("bb", "ccc"):
        add(scheduler, name, 5)
    stages = [step(scheduler).stage for _ in range(8)]
    assert stages == ["decode", "decode", "prefill", "decode", "decode", "decode", "prefill", "decode"]


def test_a_decode_step_that_failed_does_not_count_for_the_next_prefill() -> None:
    scheduler = PDScheduler(PDSchedulerConfig(max_consecutive_decodes=2))
    add(scheduler, "a", 4)
    step(scheduler)
    add(scheduler, "bb", 5)
    for _ in range(5):
        assert scheduler.schedule().stage == "decode"
        scheduler.rollback_step()
    assert [step(scheduler).stage for _ in range(3)] == ["decode", "decode", "prefill"]


@pytest.mark.parametrize("mode", ["hybrid", "time_share", "strict"])
def test_so_many_requests_run_at_once_and_no_more(mode) -> None:
    scheduler = PDScheduler(PDSchedulerConfig(mode=mode, max_prefill_batch_size=3, max_decode_batch_size=2))
    for i in range(6):
        add(scheduler, f"{i:0{i + 1}}", 4)
    step(scheduler)
    step(scheduler)
    assert scheduler.get_num_running() == 3


@pytest.mark.parametrize(
    ("choice", "first", "second"),
    [
        (ModeChoice("prefill", 30), ([30], 0), ([30], 0)),
        (ModeChoice("hybrid", 30), ([30], 1), ([30], 1)),
        (ModeChoice("hybrid"), ([50], 1), ([50], 1)),
        (ModeChoice("time_share", 30), ([], 1), ([], 1)),
    ],
)
def test_auto_follows_the_choice(choice, first, second) -> None:
    config = PDSchedulerConfig(mode="auto", max_prefill_tokens=100, prefill_chunk_size=50)
    scheduler = PDScheduler(config, mode_chooser=Fixed(choice))
    add(scheduler, "a", 4)
    step(scheduler)
    add(scheduler, "bb", 200)
    assert [(prompt_tokens(out), num_decodes(out)) for out in (step(scheduler), step(scheduler))] == [first, second]
