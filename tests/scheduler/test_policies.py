"""Order of service under each policy, and bounded waits under all of them."""

from collections import Counter

import pytest

from sageLLM.runtime.scheduler.base import KVBudget, Request
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.policy import FairShare

POLICIES = ["fcfs", "priority", "deadline", "fair_share"]


def one_at_a_time(policy: str, **config) -> PDScheduler:
    return PDScheduler(PDSchedulerConfig(max_prefill_batch_size=1, max_decode_batch_size=1, policy=policy, **config))


def add(scheduler: PDScheduler, name: str, prompt_len: int = 4, **fields) -> Request:
    request = Request(name, [1] * prompt_len, max_new_tokens=fields.pop("max_new_tokens", 1), **fields)
    scheduler.add_request(request)
    return request


def order_of_service(scheduler: PDScheduler) -> list[str]:
    """Run all requests; each yields one token and ends."""
    order = []
    while scheduler.running_requests or scheduler.waiting_queue:
        out = scheduler.schedule()
        served = [c.request for c in out.prefill_batch.chunks if c.is_last] if out.prefill_batch else []
        for request in served:
            request.output_token_ids.append(0)
        order += [request.request_id for request in served]
        scheduler.update_after_step([request.request_id for request in served])
    return order


def test_fcfs_ignores_priorities() -> None:
    scheduler = one_at_a_time("fcfs")
    for name, priority in [("c", 2), ("a", 0), ("b", 1)]:
        add(scheduler, name, priority=priority)
    assert order_of_service(scheduler) == ["c", "a", "b"]


def test_deadline_serves_requests_without_deadline_last() -> None:
    scheduler = one_at_a_time("deadline")
    for name, deadline in [("none", None), ("late", 9.0), ("soon", 1.0), ("late2", 9.0)]:
        add(scheduler, name, deadline=deadline)
    assert order_of_service(scheduler) == ["soon", "late", "late2", "none"]


def test_fair_share_does_not_delay_a_small_tenant() -> None:
    scheduler = one_at_a_time("fair_share")
    for i in range(4):
        add(scheduler, f"big{i}", tenant="big")
    for i in range(2):
        add(scheduler, f"small{i}", tenant="small")
    assert order_of_service(scheduler) == ["big0", "small0", "big1", "small1", "big2", "big3"]


def test_fair_share_counts_tokens_and_weights() -> None:
    scheduler = one_at_a_time("fair_share", tenant_weights={"paid": 4.0})
    for i in range(8):
        add(scheduler, f"paid{i}", prompt_len=9, tenant="paid")
        add(scheduler, f"free{i}", prompt_len=9, tenant="free")
    first_half = order_of_service(scheduler)[:8]
    assert [name[:4] for name in first_half].count("paid") == 6  # 4 : 1, and both start with one


def test_fair_share_accumulates_no_credit_for_idle_time() -> None:
    scheduler = one_at_a_time("fair_share")
    for i in range(4):
        add(scheduler, f"early{i}", tenant="early")
    order_of_service(scheduler)
    for i in range(3):
        add(scheduler, f"early{i}", tenant="early")
    for i in range(3):
        add(scheduler, f"new{i}", tenant="new")
    order = order_of_service(scheduler)
    assert order.index("new2") > order.index("early1")


def serve(scheduler: PDScheduler, num_steps: int, arrivals, num_outputs=lambda request: request.max_new_tokens):
    """Run steps, with the arrivals before each; returns the tokens computed per tenant."""
    tokens: Counter[str] = Counter()
    for step in range(num_steps):
        arrivals(step)
        out = scheduler.schedule()
        batches = [batch for batch in (out.prefill_batch, out.decode_batch) if batch]
        chunks = [chunk for batch in batches for chunk in batch.chunks]
        for chunk in chunks:
            tokens[chunk.request.tenant] += chunk.num_tokens
        served = [chunk.request for chunk in chunks if chunk.is_last]
        for request in served:
            request.output_token_ids.append(0)
        scheduler.update_after_step([r.request_id for r in served if r.num_output_tokens >= num_outputs(r)])
    return tokens


def keep_waiting(scheduler: PDScheduler, tenants: list[str], num: int, **fields) -> None:
    """Let each of the tenants have at least `num` waiting requests."""
    waiting = Counter(request.tenant for request in scheduler.waiting_queue)
    for tenant in tenants:
        for _ in range(num - waiting[tenant]):
            add(scheduler, f"{tenant}{scheduler._num_arrivals}", tenant=tenant, **fields)


@pytest.mark.parametrize("is_promoted", [False, True])
def test_a_returning_tenant_gets_its_share_while_a_promoted_request_heads_the_line(is_promoted) -> None:
    scheduler = one_at_a_time("fair_share", max_overtakes=16)
    add(scheduler, "c", tenant="c")
    serve(scheduler, 200, lambda step: keep_waiting(scheduler, ["a", "b"], 3))
    if is_promoted:
        scheduler.waiting_queue._promote(scheduler.waiting_queue._oldest())
    tokens = serve(scheduler, 300, lambda step: keep_waiting(scheduler, ["a", "b", "c"], 3))
    assert tokens["c"] / tokens.total() == pytest.approx(1 / 3, abs=0.02)


def test_a_promoted_request_does_not_move_the_virtual_time_past_those_that_wait() -> None:
    """`big` has a far start tag; when it is promoted and admitted, a new tenant still begins where the others are."""
    scheduler = one_at_a_time("fair_share", max_overtakes=4)
    for i in range(2):
        add(scheduler, f"big{i}", tenant="big", max_new_tokens=10_000)
    serve(scheduler, 12, lambda step: keep_waiting(scheduler, ["small"], 30), lambda request: 1)
    assert "big1" not in scheduler.waiting_queue, "promoted and served"
    tokens = serve(scheduler, 60, lambda step: keep_waiting(scheduler, ["small", "new"], 3), lambda request: 1)
    assert tokens["new"] / tokens.total() == pytest.approx(1 / 2, abs=0.05)


@pytest.mark.parametrize("num_waiting", [1, 40], ids=["one waits", "all wait"])
@pytest.mark.parametrize("mode", ["hybrid", "time_share"])
def test_equal_tenants_get_equal_service_whatever_max_new_tokens_they_ask_for(mode, num_waiting) -> None:
    """`modest` asks for what it generates, `greedy` for 25 times as much."""
    config = PDSchedulerConfig(mode=mode, max_prefill_batch_size=2, max_decode_batch_size=2, policy="fair_share")
    scheduler = PDScheduler(config)

    def arrivals(step: int) -> None:
        keep_waiting(scheduler, ["modest"], num_waiting, max_new_tokens=4)
        keep_waiting(scheduler, ["greedy"], num_waiting, max_new_tokens=100)

    tokens = serve(scheduler, 300, arrivals, lambda request: 4)
    assert tokens["greedy"] / tokens.total() == pytest.approx(1 / 2, abs=0.03)


def test_an_aborted_request_is_charged_what_it_got() -> None:
    scheduler = one_at_a_time("fair_share")
    add(scheduler, "a0", tenant="a", max_new_tokens=100)
    scheduler.schedule()
    for name in ("a1", "a2"):
        add(scheduler, name, tenant="a", max_new_tokens=100)
    scheduler.abort_request("a0")
    scheduler.abort_request("a1")
    add(scheduler, "b0", prompt_len=5, tenant="b")
    add(scheduler, "b1", prompt_len=5, tenant="b")
    scheduler.update_after_step([])
    # a owes the 4 prompt tokens of a0, so b's first request goes first and a2 before b's second.
    assert order_of_service(scheduler) == ["b0", "a2", "b1"]


def test_a_fork_that_starts_with_its_parent_is_charged(fake_engine) -> None:
    engine = fake_engine(PDScheduler(PDSchedulerConfig(policy="fair_share"), kv_budget=KVBudget(40, 4)))
    parent = engine.add("a0", 4, num_outputs=4, max_new_tokens=4, tenant="a")
    for i in range(3):
        engine.add(f"fork{i}", 4, num_outputs=4, max_new_tokens=4, tenant="a", first_token=97 + 48, fork_of=parent)
    engine.plan()
    late = engine.add("a1", 4, num_outputs=4, max_new_tokens=4, tenant="a")
    assert late.rank[0] == 8
    engine.commit(engine.steps[-1], engine.run(engine.steps[-1]))
    assert late.rank[0] == 4 * 8
    engine.run_to_end()


def test_fair_share_forgets_tenants_without_requests() -> None:
    scheduler = one_at_a_time("fair_share")
    policy = scheduler.policy
    assert isinstance(policy, FairShare)
    add(scheduler, "last", tenant="busy", priority=1)
    add(scheduler, "last2", tenant="busy", priority=1)
    for i in range(3000):
        add(scheduler, f"r{i}", tenant=f"t{i}")
        serve(scheduler, 1, lambda step: None)
    assert len(policy._accounts) <= 1024
    assert order_of_service(scheduler)[-1] == "r2999"
    assert not policy._accounts


def test_all_tenants_begin_as_equals_after_an_idle_time() -> None:
    scheduler = one_at_a_time("fair_share")
    add(scheduler, "a0", prompt_len=1000, tenant="a")
    order_of_service(scheduler)
    for i in range(2):
        add(scheduler, f"a{i}", tenant="a")
        add(scheduler, f"b{i}", tenant="b")
    assert order_of_service(scheduler) == ["a0", "b0", "a1", "b1"]


def test_a_weight_must_be_positive() -> None:
    with pytest.raises(ValueError) as error:
        FairShare({"a": 0.0})
    assert str(error.value) == "the weight of tenant 'a' must be a positive number, got 0.0"


@pytest.mark.parametrize(
    ("policy", "late"),
    [
        ("priority", {"priority": -1}),
        ("deadline", {"deadline": 0.0}),
        ("fair_share", {"tenant": "other"}),
        ("fcfs", {}),
    ],
)
def test_overtaking_is_bounded(policy, late) -> None:
    scheduler = one_at_a_time(policy, max_overtakes=5, tenant_weights={"other": 1e9})
    add(scheduler, "warm", tenant="")
    victim = add(scheduler, "victim", tenant="")
    order = []
    for i in range(40):
        add(scheduler, f"late{i}", **late)
        out = scheduler.schedule()
        served = [c.request for c in out.prefill_batch.chunks]
        order += [request.request_id for request in served]
        for request in served:
            request.output_token_ids.append(0)
        scheduler.update_after_step([request.request_id for request in served])
    assert "victim" in order
    assert order.index("victim") <= 2 * 5 + 1
    assert victim.num_output_tokens == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_all_requests_in_a_tiny_pool(fake_engine, policy) -> None:
    config = PDSchedulerConfig(mode="hybrid", policy=policy, max_overtakes=3)
    engine = fake_engine(PDScheduler(config, kv_budget=KVBudget(7, 4)))
    for i in range(12):
        fields = {"priority": -i, "tenant": f"t{i % 3}", "deadline": float(50 - i)}
        engine.add(f"r{i}", 3 + i % 9, num_outputs=6, **fields)
    engine.run_to_end()
    assert len(engine.ends) == 12
    assert all(r.output_token_ids == engine.expected_output(r) for r in engine.requests.values())
