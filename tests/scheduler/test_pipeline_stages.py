"""Micro-batches of pipeline stages: steps in flight decode different requests, and the answers stay the same."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest

from sageLLM.runtime.scheduler.base import KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig


def make(fake_engine, num_stages=2, mode="hybrid", budget=None, **config):
    scheduler = PDScheduler(PDSchedulerConfig(mode=mode, **config), kv_budget=budget, num_stages=num_stages)
    return fake_engine(scheduler)


def decoded(out: ScheduleOutput) -> set[str]:
    return {request.request_id for request in out.decode_batch.requests} if out.decode_batch else set()


def computed(out: ScheduleOutput) -> set[str]:
    last = {c.request.request_id for c in out.prefill_batch.chunks if c.is_last} if out.prefill_batch else set()
    return decoded(out) | last


def run_pipeline(engine, num_stages: int, ahead: int = 1, add=lambda step: False, max_steps: int = 3000) -> None:
    """Keeps `num_stages + ahead` steps in flight; `add(step)` adds traffic and returns whether there is more."""
    pending: deque[ScheduleOutput] = deque()
    for step in range(max_steps):
        more = add(step)
        while len(pending) < num_stages + ahead:
            newest = list(pending)[len(pending) - num_stages + 1 :] if num_stages > 1 else []
            out = engine.plan(is_ahead=True)
            for other in newest:
                assert not decoded(out) & computed(other), "a stage would wait for a token of a later stage"
            pending.append(out)
        out = pending.popleft()
        engine.commit(out, engine.run(out))
        if not (more or engine.scheduler.running_requests or engine.scheduler.waiting_queue):
            for out in pending:
                engine.commit(out, engine.run(out))
            return
    raise AssertionError(f"not done: {engine.scheduler.get_stats()}")


@pytest.mark.parametrize("num_stages", [2, 3])
def test_decodes_are_divided_among_the_stages(fake_engine, num_stages: int) -> None:
    engine = make(fake_engine, num_stages)
    requests = [engine.add(f"r{i}", 4, num_outputs=40) for i in range(7)]
    run_pipeline(engine, num_stages)
    sizes = [len(decoded(out)) for out in engine.steps[num_stages + 2 : 2 * num_stages + 2]]
    assert sum(sizes) == 7 and max(sizes) - min(sizes) <= 1, sizes
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)


def test_one_request_has_one_step_in_flight_and_one_ahead(fake_engine) -> None:
    engine = make(fake_engine, 2)
    engine.add("a", 5, num_outputs=20)
    steps = [engine.plan(is_ahead=True) for _ in range(3)]
    assert [computed(out) for out in steps] == [{"a"}, set(), {"a"}]
    with pytest.raises(RuntimeError, match="at most 2 steps can be pending, got 3"):
        engine.plan(is_ahead=True)
    for _ in range(8):
        out = steps.pop(0)
        engine.commit(out, engine.run(out))
        steps.append(engine.plan(is_ahead=True))
        assert len(computed(steps[-1]) | computed(steps[-2])) == 1, "never idle, and never twice in flight"


def test_chunks_of_a_prompt_follow_each_other_through_the_stages(fake_engine) -> None:
    engine = make(fake_engine, 2, prefill_chunk_size=8)
    engine.add("long", 30)
    steps = [engine.plan(is_ahead=True) for _ in range(3)]
    assert [(c.start, c.num_tokens) for out in steps for c in out.prefill_batch.chunks] == [(0, 8), (8, 8), (16, 8)]


def test_a_request_that_ends_by_length_is_not_decoded_further(fake_engine) -> None:
    engine = make(fake_engine, 3, budget=KVBudget(64, 4), enable_preemption=False)
    requests = [engine.add(f"r{i}", 3 + i, num_outputs=99, max_new_tokens=1 + i) for i in range(12)]
    run_pipeline(engine, 3)
    assert [r.num_output_tokens for r in requests] == [1 + i for i in range(12)]
    for out in engine.steps:
        for chunk in out.decode_batch.chunks if out.decode_batch else ():
            request = chunk.request
            assert chunk.start < request.num_prompt_tokens + request.max_new_tokens - 1


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("mode", ["hybrid", "time_share", "strict"])
@pytest.mark.parametrize("pool", ["roomy", "tight", "swap", "synchronous"])
def test_random_traffic(fake_engine, mode: str, num_stages: int, pool: str) -> None:
    for seed in range(3):
        random = Random(seed)
        tiers = {"num_host_blocks": 12} if pool == "swap" else {}
        budget = KVBudget(400 if pool == "roomy" else 14, 4, **tiers)
        config = {"preemption_mode": "swap"} if pool == "swap" else {}
        engine = make(
            fake_engine,
            num_stages,
            mode,
            budget,
            max_prefill_tokens=12,
            prefill_chunk_size=6,
            max_decode_batch_size=7,
            **config,
        )
        left, made = list(range(25)), []

        def add(step: int, engine=engine, random=random, left=left, made=made) -> bool:
            while left and random.random() < 0.4:
                number, first_token = left.pop(), random.choice((None, 5))
                made.append(
                    engine.add(f"r{number}", random.randint(1, 20), random.randint(1, 20), first_token=first_token)
                )
                if mode != "strict" and random.random() < 0.2:
                    prompt = made[-1]
                    fork = engine.add(
                        f"f{number}",
                        prompt.num_prompt_tokens,
                        5,
                        first_token=prompt.prompt_token_ids[0],
                        fork_of=prompt,
                    )
                    made.append(fork)
            if made and random.random() < 0.05:
                engine.scheduler.abort_request(random.choice(made).request_id)
            return bool(left)

        run_pipeline(engine, num_stages, 0 if pool == "synchronous" else 1, add)
        assert all(r.output_token_ids == engine.expected_output(r) for r in made)
        assert engine.scheduler.get_stats()["kv_blocks_used"] == 0
