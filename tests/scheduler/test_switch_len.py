"""A length beyond which all KV of a sequence differs: requests that outgrow it are recomputed once.

The fake engine's KV depends on the side of the length, so KV of the wrong side fails when it is read.
"""

import pytest
from test_plan_ahead import run_ahead

from sageLLM.runtime.scheduler.base import KVBudget, Request
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig

MODES = ["time_share", "hybrid", "strict"]
SWITCH_LEN = 12


def make(fake_engine, mode="time_share", num_blocks=64, **config):
    config = PDSchedulerConfig(mode=mode, **config)
    return fake_engine(PDScheduler(config, kv_budget=KVBudget(num_blocks, 4), switch_len=SWITCH_LEN))


def check(engine, requests) -> None:
    assert engine.ends == {request.request_id: 1 for request in requests}
    assert all(request.output_token_ids == engine.expected_output(request) for request in requests)
    stats = engine.scheduler.get_stats()
    assert (stats["kv_blocks_used"], stats["total_finished"]) == (0, len(requests))


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_requests_are_recomputed_once_when_they_outgrow_the_length(fake_engine, mode, is_ahead) -> None:
    engine = make(fake_engine, mode, max_prefill_tokens=8, prefill_chunk_size=4)
    lengths = [3, 11, 12, 13, 20]
    requests = [engine.add(f"r{n}", n, num_outputs=12) for n in lengths]
    if is_ahead:
        run_ahead(engine)
    else:
        engine.run_to_end()
    check(engine, requests)
    assert [request.num_preemptions for request in requests] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(("num_outputs", "num_recomputed"), [(2, 0), (3, 0), (4, 1)])
def test_a_request_that_ends_with_the_first_token_beyond_is_not_recomputed(
    fake_engine, num_outputs, num_recomputed
) -> None:
    engine = make(fake_engine)
    request = engine.add("a", 10, num_outputs=num_outputs)
    engine.run_to_end()
    check(engine, [request])
    assert request.num_preemptions == num_recomputed


def test_the_recomputation_is_a_prefill_of_all_tokens(fake_engine) -> None:
    engine = make(fake_engine)
    request = engine.add("a", 12, num_outputs=3)
    engine.step()
    out = engine.step()
    assert [(c.start, c.num_tokens, c.is_last) for c in out.prefill_batch.chunks] == [(0, 13, True)]
    assert request.is_long
    assert [(c.start, c.num_tokens) for c in engine.step().decode_batch.chunks] == [(13, 1)]


def test_cached_blocks_are_found_on_their_side_only(fake_engine) -> None:
    engine = make(fake_engine)
    engine.add("short", 10, first_token=1, num_outputs=2)
    engine.run_to_end()
    for name, length, num_cached in (("long", 16, 0), ("long again", 17, 16), ("short again", 12, 8)):
        engine.add(name, length, first_token=1, num_outputs=1)
        assert engine.step().num_cached_tokens.get(name, 0) == num_cached
        engine.run_to_end()


@pytest.mark.parametrize("num_outputs", [1, 6])
def test_forks_of_a_prompt_that_its_first_token_makes_too_long(fake_engine, num_outputs) -> None:
    engine = make(fake_engine)
    parent = engine.add("a", 12, first_token=1, num_outputs=num_outputs)
    forks = [engine.add(f"b{i}", 12, first_token=1, num_outputs=num_outputs, fork_of=parent) for i in range(2)]
    engine.run_to_end()
    check(engine, [parent, *forks])
    assert [request.is_long for request in (parent, *forks)] == [num_outputs > 1] * 3


@pytest.mark.parametrize("length", [11, 12, 13])
def test_received_kv_is_used_unless_its_first_token_outgrows_it(fake_engine, length) -> None:
    engine = make(fake_engine)
    request = Request("a", list(range(length)), output_token_ids=[5], num_computed_tokens=length)
    engine.scheduler.add_received(request)
    out = engine.scheduler.schedule()
    assert out.num_scheduled_tokens == {"a": 13 if length == SWITCH_LEN else 1}
