"""Invariants of scheduling under random arrivals, aborts, failures, tiny pools and slow copies."""

import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.runtime.scheduler.base import KVBudget, RequestStatus
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig

NUM_SCHEDULES_PER_MODE = 100

arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # step of arrival
        st.integers(1, 26),  # prompt tokens
        st.integers(1, 9),  # output tokens
        st.sampled_from([0, 0, 0, 1, -1]),  # priority
        st.sampled_from([None] * 5 + [0, 1, 4, 9]),  # steps until it is aborted
    ),
    min_size=1,
    max_size=9,
)
configs = st.fixed_dictionaries(
    {
        "max_prefill_batch_size": st.integers(1, 4),
        "max_prefill_tokens": st.integers(2, 24),
        "prefill_chunk_size": st.integers(1, 16),
        "max_decode_batch_size": st.integers(1, 5),
        "enable_preemption": st.sampled_from([True, True, True, False]),
        "max_consecutive_decodes": st.integers(1, 4),
        "enable_prefix_caching": st.sampled_from([True, True, False]),
    }
)
budgets = st.builds(KVBudget, st.integers(7, 20), st.sampled_from([4, 5, 8]), st.sampled_from([None, 8, 30]))


class Watch:
    """Checks the invariants that span several steps: order, roles, budgets and bounded waits."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.config = engine.scheduler.config
        self.waits: Counter[str] = Counter()
        self.streak = 0
        self.outputs: dict[str, list[int]] = {}
        self.copied: set[str] = set()

    def check_plan(self, out, running_before: set[str]) -> None:
        prefill = out.prefill_batch.chunks if out.prefill_batch else []
        decode = out.decode_batch.chunks if out.decode_batch else []
        ids = [c.request.request_id for c in [*prefill, *decode]]
        assert len(set(ids)) == len(ids), "a request is twice in a step"
        assert not {r.request_id for r in out.preempted_requests} & set(ids), "a victim is still in the plan"
        assert all(c.request.status is RequestStatus.PREFILLING for c in prefill)
        assert all(c.request.status is RequestStatus.DECODING and c.num_tokens == 1 for c in decode)
        newcomers = set(self.engine.scheduler.running_requests) - running_before
        assert not (newcomers and out.preempted_requests), "a preempting step admits"
        self.check_budgets(prefill, decode)
        for request in out.preempted_requests:
            self.copied.discard(request.request_id)
        if self.config.mode == "strict":
            assert {c.request.request_id for c in decode} <= self.copied, "a decode before its KV arrived"
        self.check_waits(prefill, decode, preempts=bool(out.preempted_requests))

    def check_budgets(self, prefill, decode) -> None:
        num_prefill_tokens = sum(c.num_tokens for c in prefill)
        assert len(prefill) <= self.config.max_prefill_batch_size
        assert len(decode) <= self.config.max_decode_batch_size
        assert num_prefill_tokens <= self.config.max_prefill_tokens
        assert self.engine.scheduler.get_num_running() <= self.engine.scheduler.max_batch_size
        if self.config.mode == "hybrid":
            assert num_prefill_tokens <= self.config.prefill_chunk_size
            assert num_prefill_tokens + len(decode) <= self.config.max_prefill_tokens
        if self.config.mode == "time_share":
            assert not (prefill and decode)

    def check_waits(self, prefill, decode, preempts: bool) -> None:
        """A prefill with room next to the decodes waits for few steps; so does every decode."""
        has_room = self.engine.scheduler._planner.mode._phases.prefill.has_work() and not preempts
        self.streak = self.streak + 1 if has_room and not prefill else 0
        limit = self.config.max_consecutive_decodes if self.config.mode == "time_share" else 0
        assert self.streak <= limit, "a prefill that has room is kept waiting"
        served = {c.request.request_id for c in decode}
        queue = [r.request_id for r in self.engine.scheduler.decode_queue]
        for request_id in list(self.waits):
            if request_id not in queue or request_id in served:
                del self.waits[request_id]
        num_served = min(self.config.max_decode_batch_size, max(1, self.config.max_prefill_tokens // 2))
        for request_id in queue:
            if request_id not in served:
                self.waits[request_id] += 1
                assert self.waits[request_id] <= 2 * math.ceil(self.engine.scheduler.max_batch_size / num_served) + 2

    def check_outputs(self) -> None:
        for request_id, request in self.engine.requests.items():
            before = self.outputs.get(request_id, [])
            assert request.output_token_ids[: len(before)] == before, "output shrank"
            self.outputs[request_id] = list(request.output_token_ids)


def announced_blocks_agree(engine) -> None:
    """Replay all outputs: a KV runtime that sees only these holds the same blocks as the scheduler."""
    held: set[int] = set()
    is_split = engine.scheduler.kv.is_split
    for out in engine.steps:
        assert held.issuperset(out.kv_blocks_to_free), "a block is freed that was never announced"
        held.difference_update(out.kv_blocks_to_free)
        migrating = {m.request_id for m in out.kv_migrations}
        prefilling = {c.request.request_id for c in out.prefill_batch.chunks} if out.prefill_batch else set()
        for request_id, blocks in out.kv_blocks_to_allocate.items():
            if is_split and request_id in prefilling and request_id not in migrating:
                continue
            assert held.isdisjoint(blocks), "a block is announced twice"
            held.update(blocks)
    held.difference_update(engine.scheduler.kv.freed)
    assert not held, "blocks were announced and never freed"


@pytest.mark.parametrize("mode", ["time_share", "hybrid", "strict"])
def test_random_schedules_violate_no_invariant(fake_engine, mode) -> None:
    @settings(
        max_examples=NUM_SCHEDULES_PER_MODE,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(configs, budgets, arrivals, st.sets(st.integers(0, 40), max_size=3), st.integers(0, 2))
    def run(config, budget, arrivals, failing_steps, copy_delay) -> None:
        scheduler = PDScheduler(PDSchedulerConfig(mode=mode, **config), kv_budget=budget)
        play(fake_engine(scheduler), arrivals, failing_steps, copy_delay if mode == "strict" else 0)

    run()


def play(engine, arrivals, failing_steps, copy_delay: int) -> None:
    scheduler, watch = engine.scheduler, Watch(engine)
    aborts: dict[int, list[str]] = {}
    copies: dict[str, int] = {}
    aborted: set[str] = set()
    for step in range(3000):
        for i, (arrival, prompt_len, num_outputs, priority, abort_after) in enumerate(arrivals):
            if arrival == step:
                max_new = num_outputs if i % 2 else 9
                engine.add(f"r{i}", prompt_len, num_outputs, max_new, priority, first_token=i % 3)
                if abort_after is not None:
                    aborts.setdefault(step + abort_after, []).append(f"r{i}")
        is_live = bool(scheduler.running_requests or len(scheduler.waiting_queue))
        if step > 12 and not is_live and not copies:
            break
        running_before = set(scheduler.running_requests)
        out = engine.plan()
        if step in failing_steps:
            scheduler.rollback_step()
            scheduler.check_integrity()
            engine.steps.pop()
            watch.copied -= {request.request_id for request in out.preempted_requests}
            running_before = set(scheduler.running_requests)
            out = engine.plan()
        watch.check_plan(out, running_before)
        for request_id in aborts.get(step, ()):  # while the step is pending
            if scheduler.abort_request(request_id):
                aborted.add(request_id)
        finished = engine.run(out)
        copies.update({m.request_id: step + copy_delay for m in out.kv_migrations})
        engine.commit(out, finished, pending=[i for i, due in copies.items() if due > step])
        arrived = [i for i, due in copies.items() if due <= step]
        scheduler.confirm_migrations(arrived)
        watch.copied.update(arrived)
        for request_id in arrived:
            del copies[request_id]
        scheduler.check_integrity()
        watch.check_outputs()
    else:
        raise AssertionError(f"not done after 3000 steps: {scheduler.get_stats()}")
    check_end(engine, aborted)


def check_end(engine, aborted: set[str]) -> None:
    for request_id, request in engine.requests.items():
        assert engine.ends.get(request_id, 0) + (request_id in aborted) == 1, f"{request_id} must end exactly once"
        assert request.status is RequestStatus.FINISHED
        assert request.output_token_ids == engine.expected_output(request)
        if request_id not in aborted:
            expected = min(engine.stop_after[request_id], request.max_new_tokens)
            assert request.num_output_tokens == min(expected, engine.scheduler.max_seq_len - request.num_prompt_tokens)
    stats = engine.scheduler.get_stats()
    assert stats["kv_blocks_used"] == stats.get("prefill_kv_blocks_used", 0) == 0
    assert stats["total_finished"] + stats["total_aborted"] == len(engine.requests)
    announced_blocks_agree(engine)
