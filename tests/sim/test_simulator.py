"""The simulator compared with timelines computed by hand, and its invariants on random traces."""

import dataclasses
import random
from array import array
from typing import Any

import pytest

from sageLLM.runtime.scheduler.batch import KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import StepWork
from sageLLM.runtime.sim.baselines.running_first import RunningFirstScheduler
from sageLLM.runtime.sim.metrics import Slo, Summary, Timeline
from sageLLM.runtime.sim.modes import Setup, SimMode, make_cluster
from sageLLM.runtime.sim.pipeline import Stages, equal_shares
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import TraceRequest

MODES: tuple[SimMode, ...] = ("strict", "prefill_first", "time_share", "hybrid", "vllm", "auto")


class PerToken:
    """A step with prompts takes 1 s plus 10 ms per prompt token, and a step of decodes alone 0.1 s."""

    def step_s(self, work: StepWork) -> float:
        return 1.0 + 0.01 * work.num_prompt_tokens if work.prefill else 0.1


def run(
    mode: SimMode,
    trace: list[TraceRequest],
    *,
    kv_budget: KVBudget | None = None,
    scheduler: PDSchedulerConfig | None = None,
    workers: tuple[int, int] = (1, 1),
    depth: int = 1,
    max_model_len: int | None = None,
    async_scheduling: bool = False,
) -> tuple[list[Timeline], Simulation]:
    config = scheduler or PDSchedulerConfig()
    setup = Setup(PerToken(), lambda tokens: 0.001 * tokens, kv_budget, *workers, config)
    setup = dataclasses.replace(setup, stage_shares=equal_shares(depth), max_model_len=max_model_len)
    setup = dataclasses.replace(setup, async_scheduling=async_scheduling)
    simulation = Simulation(make_cluster(mode, setup))
    return simulation.run(trace), simulation


def test_a_lone_request_on_one_worker() -> None:
    [one], simulation = run("time_share", [TraceRequest(5.0, 100, 4)])
    assert (one.ttft_s, one.tpot_s, one.e2e_s) == pytest.approx((2.0, 0.1, 2.3))
    assert one.first_token_s == pytest.approx(7.0) and max(one.gaps_s) == pytest.approx(0.1)
    assert simulation.num_steps == 4


@pytest.mark.parametrize("workers", [(1, 1), (2, 1)], ids=["pair", "handed over"])
def test_in_strict_mode_a_request_waits_for_its_transfer(workers: tuple[int, int]) -> None:
    [one], _ = run("strict", [TraceRequest(5.0, 100, 4)], workers=workers)
    assert one.ttft_s == pytest.approx(2.0)
    assert max(one.gaps_s) == pytest.approx(0.2), "0.1 s of transfer, 0.1 s of decode"
    assert one.e2e_s == pytest.approx(2.4)


@pytest.mark.parametrize("workers", [(1, 1), (1, 2)], ids=["pair", "handed over"])
def test_strict_workers_step_independently(workers: tuple[int, int]) -> None:
    trace = [TraceRequest(0.0, 100, 11), TraceRequest(2.0, 900, 1)]
    first, second = run("strict", trace, workers=workers)[0]
    assert first.last_token_s == pytest.approx(2.0 + 0.1 + 10 * 0.1), "decodes do not wait for the long prompt"
    assert second.ttft_s == pytest.approx(10.0)
    first, second = run("hybrid", trace, workers=(1, 0))[0]
    assert max(first.gaps_s) > 5, "on a shared worker they do"


def test_requests_go_to_the_worker_with_the_fewest() -> None:
    first, second, third = run("time_share", [TraceRequest(0.0, 100, 1)] * 3)[0]
    assert (first.ttft_s, second.ttft_s) == pytest.approx((2.0, 2.0))
    assert third.ttft_s == pytest.approx(4.0)


def test_a_rejected_request_gets_no_tokens_and_misses_the_objective() -> None:
    trace = [TraceRequest(0.0, 100, 2), TraceRequest(0.0, 5000, 2)]
    timelines, simulation = run("hybrid", trace, kv_budget=KVBudget(20, 16))
    assert "needs 313 KV blocks" in simulation.refusals[1]
    summary = Summary.of(timelines, Slo(100.0, 100.0), simulation.num_steps)
    assert (summary.num_finished, summary.num_refused, summary.attainment) == (1, 1, 0.5)


@pytest.mark.parametrize("workers", [(1, 1), (1, 2)])
@pytest.mark.parametrize("mode", MODES)
def test_an_answer_ends_when_it_fills_the_pool(mode: SimMode, workers: tuple[int, int]) -> None:
    trace = [TraceRequest(0.0, 100, 5000), TraceRequest(30.0, 319, 2)]
    first, second = run(mode, trace, kv_budget=KVBudget(20, 16), workers=workers)[0]
    assert (first.num_output_tokens, second.num_output_tokens) == (220, 1)
    assert first.last_token_s is not None and second.last_token_s is not None


def test_a_pipeline_starts_a_step_while_others_are_in_flight() -> None:
    """Two stages of 1 s: the second prompt enters the first stage when the first leaves it."""
    trace = [TraceRequest(0.0, 100, 1), TraceRequest(0.1, 100, 1), TraceRequest(0.2, 100, 1)]
    first, second, third = run("time_share", trace, workers=(1, 0), depth=2)[0]
    ends = [one.first_token_s for one in (first, second, third)]
    assert ends == pytest.approx([2.0, 3.0, 4.0])
    # vLLM's one scheduler computes both waiting prompts in the step that starts at 1 s, of 3 s.
    ends = [one.first_token_s for one in run("vllm", trace, workers=(1, 0), depth=2)[0]]
    assert ends == pytest.approx([2.0, 4.0, 4.0])


def test_stages_are_passed_in_order() -> None:
    stages = Stages(equal_shares(2))
    assert stages.start(0.0, 4.0) == pytest.approx(4.0) and stages.free_s == pytest.approx(2.0)
    assert stages.start(2.0, 1.0) == pytest.approx(4.5), "the short step waits for the second stage until 4 s"
    assert stages.free_s == pytest.approx(2.5)
    assert Stages().start(1.0, 4.0) == pytest.approx(5.0)
    uneven = Stages((0.25, 0.75))
    assert uneven.start(0.0, 4.0) == pytest.approx(4.0) and uneven.free_s == pytest.approx(1.0)
    assert uneven.start(1.0, 4.0) == pytest.approx(7.0), "the second stage is free at 4 s and takes 3 s"


@pytest.mark.parametrize("mode", MODES)
def test_a_pipeline_serves_all_requests(mode: SimMode) -> None:
    """A pool small enough to preempt requests with a step in flight; each scheduler of a pipeline has its share."""
    trace = drawn_trace(0)
    timelines, simulation = run(mode, trace, kv_budget=KVBudget(42, 16), scheduler=SMALL, depth=3)
    for asked, got in zip(trace, timelines, strict=True):
        assert len(got.gaps_s) == asked.num_output_tokens - 1
    for worker in simulation.cluster.workers:
        assert not worker.num_live


def test_workers_that_share_experts_step_together() -> None:
    """Two requests on two workers: a step of both takes as long as the longer one, and an idle worker waits."""
    trace = [TraceRequest(0.0, 100, 1), TraceRequest(0.5, 300, 1), TraceRequest(0.6, 100, 2)]
    setup = Setup(PerToken(), lambda tokens: 0.0, None, 1, 1, expert_parallel_size=2)
    first, second, third = Simulation(make_cluster("time_share", setup)).run(trace)
    assert first.first_token_s == pytest.approx(2.0), "alone in its group"
    assert second.first_token_s == pytest.approx(2.0 + 4.0), "waits for the step of the other worker"
    assert third.first_token_s == pytest.approx(6.0), "its step of 2 s takes as long as the one of 4 s"
    assert third.last_token_s == pytest.approx(6.1)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "strict"])
def test_groups_that_share_experts_serve_all_requests(mode: SimMode) -> None:
    setup = Setup(PerToken(), lambda tokens: 0.0, KVBudget(14, 16), 2, 2, SMALL, expert_parallel_size=2)
    simulation = Simulation(make_cluster(mode, setup))
    trace = drawn_trace(1)
    for asked, got in zip(trace, simulation.run(trace), strict=True):
        assert len(got.gaps_s) == asked.num_output_tokens - 1
    assert not simulation.cluster.num_live


@pytest.mark.parametrize("mode", MODES)
def test_answers_end_at_the_longest_sequence(mode: SimMode) -> None:
    trace = [TraceRequest(0.0, 100, 5000), TraceRequest(30.0, 120, 2)]
    (first, second), simulation = run(mode, trace, max_model_len=120)
    assert first.num_output_tokens == 20 and first.last_token_s is not None
    assert second.first_token_s is None and "max_model_len=120" in simulation.refusals[1]


def test_prefill_first_lets_no_prompt_wait_for_decodes() -> None:
    """A prompt that arrives during decodes is the next step; in time_share four decode steps come before it."""
    trace = [TraceRequest(0.0, 100, 30), TraceRequest(2.05, 100, 1)]
    waits = {mode: run(mode, trace, workers=(1, 0))[0][1].ttft_s for mode in ("prefill_first", "time_share")}
    assert waits["prefill_first"] == pytest.approx(2.05) and waits["time_share"] == pytest.approx(2.35)


def test_a_long_prompt_is_gated_by_its_whole_sequence_in_mode_vllm() -> None:
    """The pool has room for the first chunk of the second prompt only: without the gate it is admitted and preempts."""
    trace = [TraceRequest(0.0, 150, 20), TraceRequest(0.5, 150, 1)]
    preempted = {}
    for gate in (True, False):
        setup = Setup(PerToken(), lambda tokens: 0.0, KVBudget(14, 16), 1, 0, SMALL, full_sequence_must_fit=gate)
        timelines = Simulation(make_cluster("vllm", setup)).run(trace)
        preempted[gate] = sum(one.num_preemptions for one in timelines)
    assert preempted[True] == 0 < preempted[False]


TOGETHER: tuple[SimMode, ...] = tuple(mode for mode in MODES if mode != "strict")


@pytest.mark.parametrize("mode", TOGETHER)
def test_async_scheduling_delays_a_prompt_by_the_step_planned_before_it_arrived(mode: SimMode) -> None:
    """The step from 2.1 to 2.2 s was planned at 2 s, so the prompt that arrives at 2.05 s starts 0.1 s later."""
    trace = [TraceRequest(0.0, 100, 6), TraceRequest(2.05, 100, 1)]
    config = PDSchedulerConfig(max_consecutive_decodes=0)
    first, late = run(mode, trace, workers=(1, 0), scheduler=config, async_scheduling=True)[0]
    assert first.first_token_s == pytest.approx(2.0)
    assert late.first_token_s == pytest.approx(2.2 + 2.0)
    first, late = run(mode, trace, workers=(1, 0), scheduler=config)[0]
    assert late.first_token_s == pytest.approx(2.1 + 2.0)


@pytest.mark.parametrize("mode", TOGETHER)
def test_async_scheduling_does_not_delay_a_request_alone(mode: SimMode) -> None:
    """Nothing is planned ahead of its prompt, and the last step that is planned ahead is empty."""
    trace = [TraceRequest(1.0, 100, 4), TraceRequest(3.25, 100, 2)]
    first, second = run(mode, trace, workers=(1, 0), async_scheduling=True)[0]
    assert (first.ttft_s, first.tpot_s) == pytest.approx((2.0, 0.1))
    assert second.first_token_s == pytest.approx(3.3 + 2.0), "arrives in the last step, after which none was planned"


def test_async_scheduling_of_workers_that_share_experts() -> None:
    """The second worker is idle until 2.05 s: it joins the next step of the group, as nothing was planned for it."""
    trace = [TraceRequest(0.0, 100, 6), TraceRequest(2.05, 100, 1), TraceRequest(2.06, 100, 1)]
    setup = Setup(PerToken(), lambda tokens: 0.0, None, 1, 1, expert_parallel_size=2, async_scheduling=True)
    _, second, third = Simulation(make_cluster("vllm", setup)).run(trace)
    assert second.first_token_s == pytest.approx(2.1 + 2.0)
    assert third.first_token_s == pytest.approx(4.1 + 2.0), (
        "on the first worker, with a decode planned at 2 s before it"
    )


def test_async_scheduling_has_no_effect_in_pipelines_and_in_strict_mode() -> None:
    trace = drawn_trace(2)
    for mode, workers, depth in (
        ("vllm", (1, 0), 2),
        ("hybrid", (1, 0), 2),
        ("strict", (1, 1), 1),
        ("strict", (1, 2), 1),
    ):
        settings = {"workers": workers, "depth": depth, "scheduler": SMALL}
        assert run(mode, trace, **settings)[0] == run(mode, trace, **settings, async_scheduling=True)[0]


def drawn_trace(seed: int) -> list[TraceRequest]:
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, 20) for _ in range(40))
    return [TraceRequest(time, draw.randint(1, 150), draw.randint(1, 30)) for time in times]


SMALL = PDSchedulerConfig(max_prefill_tokens=64, prefill_chunk_size=32, max_decode_batch_size=4)


# Two seeds for `auto`, which replays forecasts and takes ten times as long: it schedules by the rules of the others.
@pytest.mark.parametrize("is_async", [False, True], ids=["", "async"])
@pytest.mark.parametrize("workers", [(1, 1), (1, 2)])
@pytest.mark.parametrize(("mode", "seed"), [(mode, i) for mode in MODES for i in range(2 if mode == "auto" else 6)])
def test_all_requests_are_served_completely_and_reproducibly(
    mode: SimMode, seed: int, workers: tuple[int, int], is_async: bool
) -> None:
    """With a pool so small that requests are preempted: every answer is complete, in order, and reproducible."""
    trace = drawn_trace(seed)
    settings: dict[str, Any] = {"kv_budget": KVBudget(14, 16), "scheduler": SMALL, "async_scheduling": is_async}
    timelines, simulation = run(mode, trace, workers=workers, **settings)
    for asked, got in zip(trace, timelines, strict=True):
        assert got.first_token_s is not None and got.last_token_s is not None
        assert asked.arrival_s < got.first_token_s <= got.last_token_s
        assert len(got.gaps_s) == asked.num_output_tokens - 1
        assert sum(got.gaps_s) == pytest.approx(got.last_token_s - got.first_token_s)
    assert not simulation.cluster.num_live
    for worker in simulation.cluster.workers:
        assert isinstance(worker.scheduler, PDScheduler | RunningFirstScheduler)
        assert worker.scheduler.get_stats()["kv_blocks_used"] == 0, "all blocks are free at the end"
    assert timelines == run(mode, trace, workers=workers, **settings)[0]


def test_small_pools_do_preempt() -> None:
    trace = [TraceRequest(0.0, 60, 100)] * 4
    preempted = {
        mode: sum(one.num_preemptions for one in run(mode, trace, kv_budget=KVBudget(14, 16))[0]) for mode in MODES
    }
    assert all(preempted.values()), preempted


def test_shared_prefixes_are_computed_once_by_the_vllm_policy() -> None:
    shared = [TraceRequest(20.0 * i, 1024, 2, block_hashes=(1, 2 + i)) for i in range(2)]
    first, second = run("vllm", shared, workers=(1, 0))[0]
    assert first.ttft_s == pytest.approx(1.0 + 10.24)
    assert second.ttft_s == pytest.approx(1.0 + 5.12), "512 of its tokens are cached"


def test_a_scheduler_that_loses_requests_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PDScheduler, "plan_ahead", lambda self: ScheduleOutput())
    with pytest.raises(RuntimeError, match=r"1 requests wait at 5\.000 s and no worker will ever step"):
        run("hybrid", [TraceRequest(5.0, 10, 2)])


def test_a_summary_computed_by_hand() -> None:
    timelines = [
        Timeline(0, 0.0, 10, 3, first_token_s=1.0, last_token_s=2.0, gaps_s=array("d", [0.4, 0.6])),
        Timeline(1, 1.0, 10, 1, first_token_s=4.0, last_token_s=4.0),
        Timeline(2, 1.0, 10, 5),
    ]
    summary = Summary.of(timelines, Slo(ttft_s=2.0, tpot_s=0.5), num_steps=7)
    assert (summary.num_requests, summary.num_finished, summary.num_refused, summary.num_steps) == (3, 2, 1, 7)
    assert summary.ttft[50] == pytest.approx(2.0) and summary.tpot[99] == pytest.approx(0.5)
    assert summary.tbt[50] == pytest.approx(0.5) and summary.e2e[50] == pytest.approx(2.5)
    assert (summary.mean_ttft, summary.mean_tpot) == (2.0, 0.5)
    assert summary.output_throughput == pytest.approx(4 / 4.0)
    assert summary.attainment == pytest.approx(1 / 3) and summary.goodput == pytest.approx(1 / 4)
