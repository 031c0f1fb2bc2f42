"""Forks that share the prompt of their parent, and victims with KV kept in a tier."""

import pytest

from sageLLM.runtime.scheduler.base import KVBudget, RequestStatus
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig

MODES = ["time_share", "hybrid", "strict"]


def make(fake_engine, mode="hybrid", num_blocks=20, host=0, disk=0, **config):
    budget = KVBudget(num_blocks, 4, num_host_blocks=host, num_disk_blocks=disk)
    return fake_engine(PDScheduler(PDSchedulerConfig(mode=mode, **config), kv_budget=budget))


def add_group(engine, name="a", prompt_len=10, n=3, num_outputs=6):
    parent = engine.add(f"{name}0", prompt_len, num_outputs, first_token=1)
    forks = [engine.add(f"{name}{i}", prompt_len, num_outputs + i, first_token=1, fork_of=parent) for i in range(1, n)]
    return [parent, *forks]


def check(engine, requests) -> None:
    assert all(r.output_token_ids == engine.expected_output(r) for r in requests)
    assert engine.ends == {r.request_id: 1 for r in requests}
    stats = engine.scheduler.get_stats()
    assert stats["kv_blocks_used"] == stats.get("prefill_kv_blocks_used", 0) == 0


def test_forks_prefill_nothing_and_share_full_blocks(fake_engine) -> None:
    engine = make(fake_engine)
    group = add_group(engine)
    assert (engine.scheduler.get_num_waiting(), engine.scheduler.forks_of("a0")) == (3, group[1:])
    out = engine.step()
    assert out.num_scheduled_tokens == {"a0": 10}
    assert [r.status for r in group] == [RequestStatus.DECODING] * 3
    out = engine.plan()
    assert out.num_scheduled_tokens == dict.fromkeys(["a0", "a1", "a2"], 1)
    assert len(out.block_copies) == 2  # the block with tokens 8 and 9, once for each fork
    assert {copy.source for copy in out.block_copies} == {group[0].kv_block_ids[2]}
    assert all(r.kv_block_ids[:2] == group[0].kv_block_ids[:2] for r in group)
    assert engine.scheduler.get_stats()["kv_blocks_used"] == 5
    engine.commit(out, engine.run(out))
    engine.run_to_end()
    check(engine, group)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_blocks", [5, 8, 30])
@pytest.mark.parametrize("prompt_len", [8, 10])
def test_forks_emit_what_the_parent_emits(fake_engine, mode, num_blocks, prompt_len) -> None:
    engine = make(fake_engine, mode, num_blocks, max_prefill_tokens=6)
    requests = add_group(engine, "a", prompt_len) + add_group(engine, "b", prompt_len, n=2)
    engine.run_to_end()
    check(engine, requests)


def test_forks_of_an_aborted_parent_become_ordinary_requests(fake_engine) -> None:
    engine = make(fake_engine, max_prefill_tokens=6)
    parent, *forks = add_group(engine)
    engine.step()
    assert engine.scheduler.abort_request("a0")
    assert engine.scheduler.abort_request("a2")
    assert list(engine.scheduler.waiting_queue) == [forks[0]]
    engine.run_to_end()
    assert forks[0].output_token_ids == engine.expected_output(forks[0])
    assert engine.ends == {"a1": 1}
    assert parent.status is forks[1].status is RequestStatus.FINISHED


def test_a_waiting_fork_can_be_aborted_and_occupies_its_id_until_then(fake_engine) -> None:
    engine = make(fake_engine)
    _, fork = add_group(engine, n=2)
    with pytest.raises(ValueError, match="already being served"):
        engine.add("a1", 3)
    assert engine.scheduler.abort_request("a1")
    assert engine.scheduler.forks_of("a0") == []
    engine.run_to_end()
    assert engine.ends == {"a0": 1}
    assert fork.num_output_tokens == 0


def test_a_copy_for_a_fork_is_announced_again_after_a_failed_step(fake_engine) -> None:
    engine = make(fake_engine)
    group = add_group(engine, n=2)
    engine.step()
    first = engine.scheduler.schedule()
    engine.scheduler.rollback_step()
    again = engine.plan()
    assert again.block_copies == first.block_copies != []
    assert again.kv_blocks_to_allocate == first.kv_blocks_to_allocate
    engine.commit(again, engine.run(again))
    engine.run_to_end()
    check(engine, group)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("host", "disk"), [(20, 0), (2, 20), (0, 20), (3, 0)])
def test_swapped_victims_continue_without_recomputation(fake_engine, mode, host, disk) -> None:
    engine = make(fake_engine, mode, 7, host, disk, preemption_mode="swap")
    requests = [engine.add(f"r{i}", 5 + i, num_outputs=12, first_token=i) for i in range(5)]
    engine.run_to_end()
    check(engine, requests)
    stats = engine.scheduler.get_stats()
    assert 0 < stats["total_swaps"] <= stats["total_preemptions"]
    kv = engine.scheduler.kv.decode.stats()
    assert (kv.num_host_used, kv.num_disk_used) == (0, 0)


def test_victims_are_recomputed_when_the_tiers_are_full(fake_engine) -> None:
    engine = make(fake_engine, "hybrid", 7, 1, preemption_mode="swap")
    requests = [engine.add(f"r{i}", 6, num_outputs=12) for i in range(4)]
    engine.run_to_end()
    check(engine, requests)
    stats = engine.scheduler.get_stats()
    assert stats["total_swaps"] == 0 < stats["total_recomputed_tokens"]


def until_swap(engine, target: str):
    while True:
        out = engine.plan()
        if any(copy.target == target if target == "device" else copy.source == "device" for copy in out.tier_copies):
            return out
        engine.commit(out, engine.run(out))


@pytest.mark.parametrize("target", ["host", "device"])
def test_a_failed_swap_is_recomputed(fake_engine, target) -> None:
    engine = make(fake_engine, "hybrid", 7, 20, preemption_mode="swap")
    requests = [engine.add(f"r{i}", 6, num_outputs=12) for i in range(4)]
    out = until_swap(engine, target)
    failed = [copy.seq_id for copy in out.tier_copies]
    engine.scheduler.rollback_step()
    engine.scheduler.fail_swaps([*failed, "unknown"])
    engine.scheduler.check_integrity()
    engine.victims.update(dict.fromkeys(failed, 0))
    engine.run_to_end()
    check(engine, requests)
    assert engine.scheduler.get_stats()["total_recomputed_tokens"] > 0


@pytest.mark.parametrize("target", ["host", "device"])
@pytest.mark.parametrize("when", ["planned", "rolled back", "committed"])
def test_abort_during_a_swap_leaks_nothing(fake_engine, target, when) -> None:
    engine = make(fake_engine, "hybrid", 7, 20, preemption_mode="swap")
    for i in range(4):
        engine.add(f"r{i}", 6, num_outputs=12)
    out = until_swap(engine, target)
    victim = out.tier_copies[0].seq_id
    if when == "rolled back":
        engine.scheduler.rollback_step()
        engine.steps.remove(out)
    finished = engine.run(out) if when == "committed" else []
    if when == "committed":
        engine.commit(out, finished)
    assert engine.scheduler.abort_request(victim)
    if when == "planned":
        engine.commit(out, engine.run(out))
    engine.scheduler.check_integrity()
    engine.run_to_end()
    stats, kv = engine.scheduler.get_stats(), engine.scheduler.kv.decode.stats()
    assert (stats["kv_blocks_used"], kv.num_host_used, kv.num_in_transfer) == (0, 0, 0)


def test_a_dead_worker_loses_the_tiers(fake_engine) -> None:
    engine = make(fake_engine, "hybrid", 7, 20, preemption_mode="swap")
    requests = [engine.add(f"r{i}", 6, num_outputs=12) for i in range(4)]
    out = until_swap(engine, "host")
    engine.commit(out, engine.run(out))
    engine.plan()
    engine.scheduler.lose_kv()
    engine.decode_cache.clear()
    engine.tiers["host"].clear()
    engine.victims.update(dict.fromkeys((r.request_id for r in requests), 0))
    engine.scheduler.check_integrity()
    engine.run_to_end()
    check(engine, requests)
