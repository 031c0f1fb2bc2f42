"""Order of service under each policy, and bounded waits under all of them."""

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
