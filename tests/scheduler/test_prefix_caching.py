"""Prefix caching: in every mode cached tokens are not scheduled, and outputs stay the same."""

import pytest

from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.request import Request

MODES = ["time_share", "hybrid", "strict"]


def make(fake_engine, mode="time_share", num_blocks=20, **config):
    return fake_engine(PDScheduler(PDSchedulerConfig(mode=mode, **config), kv_budget=KVBudget(num_blocks, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_a_repeated_prompt_computes_only_what_is_not_cached(fake_engine, mode) -> None:
    engine = make(fake_engine, mode)
    first = engine.add("a", 10, first_token=1)
    engine.run_to_end()
    second = engine.add("b", 11, first_token=1)
    out = engine.plan()
    assert out.num_cached_tokens == {"b": 8}
    assert out.num_scheduled_tokens == {"b": 3}
    engine.commit(out, engine.run(out))
    engine.run_to_end()
    assert second.output_token_ids == engine.expected_output(second)
    assert first.output_token_ids == engine.expected_output(first)
    assert engine.scheduler.get_stats()["total_cached_tokens"] == 8


def test_a_fully_cached_prompt_still_yields_its_token(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("a", 8, first_token=1)
    engine.run_to_end()
    request = engine.add("b", 8, first_token=1)
    assert engine.step().num_scheduled_tokens == {"b": 4}
    assert len(request.output_token_ids) == 1


def test_a_running_prefill_shares_its_chunks_as_they_are_committed(fake_engine) -> None:
    engine = make(fake_engine, max_prefill_tokens=6)
    engine.add("a", 12, first_token=1)
    engine.step()
    engine.add("b", 12, first_token=1, priority=-1)
    out = engine.step()
    assert out.num_cached_tokens == {"b": 4}
    assert out.num_scheduled_tokens == {"b": 6}
    engine.run_to_end()


def test_salts_share_nothing_and_caching_can_be_disabled(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("a", 10, first_token=1)
    engine.run_to_end()
    request = engine.add("b", 10, first_token=1, salt="other")
    assert engine.step().num_scheduled_tokens == {"b": 10}
    engine.run_to_end()
    assert request.output_token_ids == engine.expected_output(request)
    off = make(fake_engine, enable_prefix_caching=False)
    off.add("a", 10, first_token=1)
    off.run_to_end()
    off.add("b", 10, first_token=1)
    assert off.step().num_scheduled_tokens == {"b": 10}


def test_a_cached_prefix_leaves_room_for_more_requests(fake_engine) -> None:
    """Four blocks of prompt each, ten in all: only with shared prefixes do three requests fit."""
    engine = make(fake_engine, num_blocks=10)
    engine.add("first", 16, num_outputs=1, first_token=1)
    engine.run_to_end()
    for name in ("a", "b", "c"):
        engine.add(name, 16, first_token=1)
    engine.step()
    assert engine.scheduler.get_num_running() == 3
    engine.run_to_end()


def test_a_rolled_back_step_announces_its_cache_hits_again(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("a", 10, first_token=1)
    engine.run_to_end()
    engine.add("b", 10, first_token=1)
    first = engine.scheduler.schedule()
    engine.scheduler.rollback_step()
    again = engine.plan()
    assert again.num_cached_tokens == first.num_cached_tokens == {"b": 8}
    assert again.num_scheduled_tokens == first.num_scheduled_tokens
    assert again.kv_blocks_to_allocate == first.kv_blocks_to_allocate
    engine.commit(again, engine.run(again))
    engine.run_to_end()


def test_a_received_request_shares_no_block_that_its_sender_writes(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("a", 10, num_outputs=8, first_token=1)
    engine.step()
    received = Request("r", [1 + i for i in range(10)], output_token_ids=[5], num_computed_tokens=10)
    engine.scheduler.add_received(received)
    engine.scheduler.schedule()
    running = engine.scheduler.running_requests["a"]
    assert set(running.kv_block_ids).isdisjoint(received.kv_block_ids)
    assert received.num_computed_tokens == 10
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_worker_loses_its_cache(fake_engine, mode) -> None:
    engine = make(fake_engine, mode)
    engine.add("a", 10, num_outputs=8, first_token=1)
    engine.step()
    engine.step()
    out = engine.plan()
    engine.scheduler.abort_request("a")  # its blocks go back only after the worker's death
    engine.scheduler.lose_kv()
    engine.steps.remove(out)
    request = engine.add("b", 10, first_token=1)
    assert engine.step().num_scheduled_tokens == {"b": 10}
    engine.run_to_end()
    assert request.output_token_ids == engine.expected_output(request)
