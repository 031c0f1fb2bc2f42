"""Running-first policy: budgets, victims, admission and prefix hits as in vLLM's v1 scheduler."""

import random

import pytest
from running_first_oracle import Item, Oracle

from sageLLM.runtime.scheduler.base import KVBudget, Request, RequestStatus
from sageLLM.runtime.sim.baselines.running_first import RunningFirstConfig, RunningFirstScheduler


def make(num_blocks=1000, block_size=16, max_model_len=None, **settings) -> RunningFirstScheduler:
    budget = KVBudget(num_blocks, block_size)
    return RunningFirstScheduler(RunningFirstConfig(**settings), kv_budget=budget, max_model_len=max_model_len)


def add(scheduler, name: str, prompt: int | list[int], **fields) -> Request:
    tokens = [hash(name) % 1000 + 1] * prompt if isinstance(prompt, int) else prompt
    request = Request(name, tokens, max_new_tokens=fields.pop("max_new_tokens", 100), **fields)
    scheduler.add_request(request)
    return request


def finish_step(scheduler, out, finished=()) -> None:
    """Append a token to every request with a last chunk, and commit."""
    for batch in (out.prefill_batch, out.decode_batch):
        for chunk in batch.chunks if batch else ():
            if chunk.is_last:
                chunk.request.output_token_ids.append(7)
    scheduler.update_after_step(finished)
    scheduler.check_integrity()


def step(scheduler):
    out = scheduler.schedule()
    finish_step(scheduler, out)
    return out


def test_running_requests_get_the_budget_in_order_up_to_the_threshold() -> None:
    scheduler = make(max_num_batched_tokens=1024, long_prefill_token_threshold=400, enable_prefix_caching=False)
    for name in "abc":
        add(scheduler, name, 800)
    assert step(scheduler).num_scheduled_tokens == {"a": 400, "b": 400, "c": 224}
    assert step(scheduler).num_scheduled_tokens == {"a": 400, "b": 400, "c": 224}
    assert step(scheduler).num_scheduled_tokens == {"a": 1, "b": 1, "c": 352}


@pytest.mark.parametrize(("is_chunked", "first"), [(True, {"a": 800, "b": 224}), (False, {"a": 800})])
def test_without_chunking_a_prompt_beyond_the_budget_blocks_the_queue(is_chunked, first) -> None:
    scheduler = make(max_num_batched_tokens=1024, enable_chunked_prefill=is_chunked, enable_prefix_caching=False)
    for name, prompt in [("a", 800), ("b", 800), ("c", 10), ("d", 10)]:
        add(scheduler, name, prompt)
    assert step(scheduler).num_scheduled_tokens == first


def test_max_num_seqs_bounds_admission() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, 5)
    assert set(step(scheduler).num_scheduled_tokens) == {"a", "b"}


def test_the_last_running_request_is_preempted_and_its_late_token_is_kept() -> None:
    """Two prompts fill the pool; the step after next is planned before the second one's first token is known."""
    scheduler = make(num_blocks=10, enable_prefix_caching=False, max_num_batched_tokens=100)
    first = add(scheduler, "first", 80)
    out_1 = scheduler.schedule()
    second = add(scheduler, "second", 80)
    out_2 = scheduler.schedule()
    assert out_2.num_scheduled_tokens == {"second": 80}
    finish_step(scheduler, out_1)
    out_3 = scheduler.schedule()
    assert out_3.preempted_requests == [second]
    assert out_3.num_scheduled_tokens == {"first": 1}
    assert (second.status, second.num_computed_tokens) == (RequestStatus.PREEMPTED, 0)
    finish_step(scheduler, out_2)
    assert second.output_token_ids == [7]
    assert (second.status, first.num_output_tokens) == (RequestStatus.PREEMPTED, 1)


def test_a_preempting_step_admits_nothing_and_victims_come_first() -> None:
    scheduler = make(num_blocks=4, block_size=4, enable_prefix_caching=False)
    add(scheduler, "first", 8)
    second = add(scheduler, "second", 8)
    small = add(scheduler, "small", 1)
    step(scheduler)
    out = step(scheduler)
    assert out.preempted_requests == [second]
    assert out.num_scheduled_tokens == {"first": 1}
    assert list(scheduler.waiting_queue) == [second, small]


def test_priority_preempts_the_largest_value_and_returns_its_tokens() -> None:
    scheduler = make(num_blocks=5, block_size=4, policy="priority", enable_prefix_caching=False)
    low = add(scheduler, "low", 5, priority=5)
    step(scheduler)
    high = add(scheduler, "high", 12, priority=0)
    step(scheduler)
    out = scheduler.schedule()  # `low` has taken its token (and no block) when `high` lacks a block
    assert out.preempted_requests == [low]
    assert out.num_scheduled_tokens == {"high": 1}
    assert out.kv_blocks_to_allocate.keys() == {"high"}
    finish_step(scheduler, out)
    assert high.num_computed_tokens == 13


def test_a_request_that_preempts_itself_ends_the_phase() -> None:
    scheduler = make(num_blocks=5, block_size=4, policy="priority", enable_prefix_caching=False)
    low = add(scheduler, "low", 7, priority=5)
    step(scheduler)
    add(scheduler, "high", 12, priority=0)
    step(scheduler)
    out = scheduler.schedule()
    assert out.preempted_requests == [low]
    assert out.num_scheduled_tokens == {}


def test_priority_orders_the_waiting_queue() -> None:
    scheduler = make(policy="priority", max_num_seqs=1)
    for name, priority in [("c", 2), ("a", 0), ("b", 1)]:
        add(scheduler, name, 4, priority=priority, max_new_tokens=1)
    order = [next(iter(step(scheduler).num_scheduled_tokens)) for _ in range(3)]
    assert order == ["a", "b", "c"]


@pytest.mark.parametrize(("length", "hit"), [(32, 16), (33, 32), (47, 32), (16, 0), (15, 0)])
def test_a_prefix_hit_is_whole_blocks_and_leaves_a_token(length, hit) -> None:
    scheduler = make()
    tokens = list(range(length))
    add(scheduler, "a", tokens, max_new_tokens=1)
    step(scheduler)
    add(scheduler, "b", tokens)
    out = scheduler.schedule()
    assert out.num_cached_tokens == {"b": hit}
    assert out.num_scheduled_tokens == {"b": length - hit}


def test_equal_prompts_of_one_step_share_blocks() -> None:
    scheduler = make(num_blocks=20)
    a, b = add(scheduler, "a", list(range(40))), add(scheduler, "b", list(range(40)))
    out = scheduler.schedule()
    assert out.num_scheduled_tokens == {"a": 40, "b": 8}
    assert a.kv_block_ids[:2] == b.kv_block_ids[:2]
    assert a.kv_block_ids[2] != b.kv_block_ids[2]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=6, block_size=4)
    add(scheduler, "first", list(range(8)), max_new_tokens=2)
    second = add(scheduler, "second", list(range(100, 112)))
    step(scheduler)
    out = step(scheduler)
    assert out.preempted_requests == [second]
    out = step(scheduler)
    assert out.num_cached_tokens == {"second": 12}
    assert out.num_scheduled_tokens == {"second": 1}


def test_the_oldest_free_blocks_are_reused_the_tail_of_a_sequence_first() -> None:
    scheduler = make(num_blocks=4, block_size=4)
    a = add(scheduler, "a", list(range(12)), max_new_tokens=1)
    out = scheduler.schedule()
    table = list(a.kv_block_ids)
    finish_step(scheduler, out)
    b = add(scheduler, "b", list(range(50, 57)), max_new_tokens=1)
    scheduler.schedule()
    assert b.kv_block_ids == [3, table[2]]  # the one never used, then the last one of `a`


@pytest.mark.parametrize(("must_fit", "admitted"), [(False, {"a", "b"}), (True, {"a"})])
def test_the_gate_admits_only_whole_sequences(must_fit, admitted) -> None:
    scheduler = make(num_blocks=10, block_size=4, max_num_batched_tokens=20, full_sequence_must_fit=must_fit)
    add(scheduler, "a", 16, max_new_tokens=1)
    add(scheduler, "b", 36)
    assert set(scheduler.schedule().num_scheduled_tokens) == admitted


def test_a_head_that_does_not_fit_blocks_the_queue() -> None:
    scheduler = make(num_blocks=6, block_size=4, enable_prefix_caching=False)
    add(scheduler, "a", 16)
    step(scheduler)
    add(scheduler, "large", 12)
    add(scheduler, "small", 1)
    assert set(step(scheduler).num_scheduled_tokens) == {"a"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"policy": "lifo"}, "policy must be one of fcfs, priority; got 'lifo'"),
    ],
)
def test_invalid_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValueError) as error:
        RunningFirstConfig(**settings)
    assert str(error.value) == message


def test_a_prompt_that_no_step_can_compute_is_refused() -> None:
    scheduler = make(enable_chunked_prefill=False, max_num_batched_tokens=8)
    with pytest.raises(ValueError) as error:
        add(scheduler, "a", 9)
    expected = (
        "request 'a' has 9 prompt tokens; without chunked prefill at most max_num_batched_tokens=8 can be computed"
    )
    assert str(error.value) == expected


def test_the_threshold_caps_a_prompt_before_it_is_compared_with_the_budget() -> None:
    settings = {"max_num_batched_tokens": 10, "long_prefill_token_threshold": 6, "enable_chunked_prefill": False}
    scheduler = make(**settings, enable_prefix_caching=False)
    add(scheduler, "a", 15)
    add(scheduler, "b", 5)
    assert step(scheduler).num_scheduled_tokens == {"a": 6}
    assert step(scheduler).num_scheduled_tokens == {"a": 6}
    assert step(scheduler).num_scheduled_tokens == {"a": 3, "b": 5}


def test_async_scheduling_plans_tokens_that_are_still_computed() -> None:
    """An answer of three tokens: each step but the first is planned before the one before it has ended."""
    scheduler = make(async_scheduling=True)
    add(scheduler, "a", 10, max_new_tokens=3)
    steps = [scheduler.schedule() for _ in range(4)]
    assert [step.num_scheduled_tokens for step in steps] == [{"a": 10}, {"a": 1}, {"a": 1}, {}]
    assert steps[1].prefill_batch is None and steps[1].decode_batch is not None, "a decode although no token is known"
    for step in steps:
        finish_step(scheduler, step)
    assert not scheduler.running_requests and scheduler.get_stats()["kv_blocks_used"] == 0


def test_async_scheduling_continues_a_prompt_and_frees_an_ended_request_at_once() -> None:
    scheduler = make(async_scheduling=True, max_num_seqs=2, max_num_batched_tokens=8, enable_prefix_caching=False)
    add(scheduler, "a", 6, max_new_tokens=1)
    add(scheduler, "b", 12)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first.num_scheduled_tokens == {"a": 6, "b": 2}
    assert second.num_scheduled_tokens == {"b": 8}, "a ends with the pending step"
    finish_step(scheduler, first)
    assert scheduler.get_stats()["kv_blocks_used"] == 1, "the block of a, which is in no pending step, is free"
    add(scheduler, "c", 3)
    assert scheduler.schedule().num_scheduled_tokens == {"b": 2, "c": 3}


@pytest.mark.parametrize("seed", range(20))
def test_async_scheduling_decides_as_if_tokens_were_known_when_planned(seed) -> None:
    """The oracle gets the tokens of a step when it is planned, and the ends one step later. Prefixes are not cached."""
    rng = random.Random(seed)
    num_blocks, settings = rng.randint(7, 14), random_settings(rng) | {"enable_prefix_caching": False}
    scheduler = make(num_blocks=num_blocks, block_size=4, **settings, async_scheduling=True)
    oracle = Oracle(scheduler.config, num_blocks, 4)
    items: dict[str, Item] = {}
    limits: dict[str, int] = {}
    pending, ends = None, []
    for number in range(160):
        if number < 100 and rng.random() < 0.4:
            name, prompt = f"r{number}", [0] * rng.randint(1, 16)
            request = add(scheduler, name, prompt, max_new_tokens=rng.randint(1, 12), priority=rng.randint(0, 2))
            items[name] = Item(name, list(prompt), request.priority, number)
            limits[name] = len(prompt) + request.max_new_tokens
            oracle.add(items[name])
        out, decision = scheduler.schedule(), oracle.step()
        assert out.num_scheduled_tokens == decision.scheduled
        assert [request.request_id for request in out.preempted_requests] == decision.preempted
        chunks = [chunk for batch in (out.prefill_batch, out.decode_batch) if batch for chunk in batch.chunks]
        new_ends = []
        for item in (items[chunk.request.request_id] for chunk in chunks if chunk.is_last):
            item.tokens.append(7)
            if len(item.tokens) == limits[item.name]:
                item.num_planned += 1  # its last token is not computed in a further step
                new_ends.append(item.name)
        if pending is not None:
            finish_step(scheduler, pending, ends)
            for name in ends:
                oracle.end(name)
        pending, ends = out, new_ends
    assert scheduler.get_stats()["num_running"] == len(oracle.running)


def random_settings(rng: random.Random) -> dict[str, object]:
    return {
        "max_num_seqs": rng.randint(1, 6),
        "max_num_batched_tokens": rng.randint(16, 40),
        "long_prefill_token_threshold": rng.choice([0, 0, 7]),
        "enable_chunked_prefill": rng.random() < 0.7,
        "enable_prefix_caching": rng.random() < 0.7,
        "policy": rng.choice(["fcfs", "priority"]),
        "full_sequence_must_fit": rng.random() < 0.3,
    }


@pytest.mark.parametrize("seed", range(60))
def test_every_decision_matches_the_oracle(seed) -> None:
    """Tokens, victims, hits, block tables and both queues, step by step."""
    rng = random.Random(seed)
    num_blocks, settings = rng.randint(7, 14), random_settings(rng)
    scheduler = make(num_blocks=num_blocks, block_size=4, **settings)
    oracle = Oracle(scheduler.config, num_blocks, 4)
    pairs: dict[str, tuple[Request, Item]] = {}
    for number in range(120):
        if number < 80 and rng.random() < 0.4:
            name, priority = f"r{number}", rng.randint(0, 2)
            prompt = [0] * rng.randint(1, 9) + [rng.randint(0, 1) for _ in range(rng.randint(0, 7))]
            request = add(scheduler, name, prompt, max_new_tokens=rng.randint(1, 12), priority=priority)
            pairs[name] = request, Item(name, list(prompt), priority, number)
            oracle.add(pairs[name][1])
        out, decision = scheduler.schedule(), oracle.step()
        assert out.num_scheduled_tokens == decision.scheduled
        assert [request.request_id for request in out.preempted_requests] == decision.preempted
        assert out.num_cached_tokens == decision.cached
        assert list(scheduler.running_requests) == [item.name for item in oracle.running]
        assert [request.request_id for request in scheduler.waiting_queue] == [item.name for item in oracle.waiting]
        assert all(request.kv_block_ids == item.table for request, item in pairs.values())
        served = [
            pairs[c.request.request_id]
            for b in (out.prefill_batch, out.decode_batch)
            if b
            for c in b.chunks
            if c.is_last
        ]
        for _, item in served:
            item.tokens.append(7)
        finished = [item.name for request, item in served if request.num_output_tokens + 1 >= request.max_new_tokens]
        finish_step(scheduler, out, finished)
        for name in finished:
            oracle.end(name)
    assert scheduler.get_stats()["num_running"] == len(oracle.running)


@pytest.mark.parametrize("seed", range(8))
def test_random_loads_end_and_leak_nothing(seed) -> None:
    rng = random.Random(seed)
    policy = rng.choice(["fcfs", "priority"])
    scheduler = make(
        num_blocks=rng.randint(8, 20),
        block_size=4,
        policy=policy,
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(4, 40),
    )
    requests = []
    for i in range(300):
        if i < 200 and rng.random() < 0.3:
            prompt = [0] * rng.randint(1, 12) + [rng.randint(0, 2) for _ in range(rng.randint(0, 12))]
            requests.append(
                add(scheduler, f"r{i}", prompt, max_new_tokens=rng.randint(1, 8), priority=rng.randint(0, 3))
            )
        if requests and rng.random() < 0.05:
            scheduler.abort_request(rng.choice(requests).request_id)
        out = step(scheduler)
        assert sum(out.num_scheduled_tokens.values()) <= scheduler.config.max_num_batched_tokens
        assert len(scheduler.running_requests) <= scheduler.config.max_num_seqs
    for _ in range(2000):
        if not (scheduler.running_requests or scheduler.waiting_queue):
            break
        step(scheduler)
    assert all(request.status is RequestStatus.FINISHED for request in requests)
    assert scheduler.kv.num_free == scheduler.kv.num_blocks
