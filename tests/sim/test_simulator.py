"""The simulator compared with timelines computed by hand, and its invariants on random traces."""

import random
from array import array

import pytest

from sageLLM.runtime.scheduler.batch import KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import StepWork
from sageLLM.runtime.sim.metrics import Slo, Summary, Timeline
from sageLLM.runtime.sim.modes import Setup, SimMode, make_cluster
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import TraceRequest

MODES: tuple[SimMode, ...] = ("strict", "time_share", "hybrid", "vllm", "auto")


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
) -> tuple[list[Timeline], Simulation]:
    config = scheduler or PDSchedulerConfig()
    setup = Setup(PerToken(), lambda tokens: 0.001 * tokens, kv_budget, *workers, config)
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


def drawn_trace(seed: int) -> list[TraceRequest]:
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, 20) for _ in range(40))
    return [TraceRequest(time, draw.randint(1, 150), draw.randint(1, 30)) for time in times]


SMALL = PDSchedulerConfig(max_prefill_tokens=64, prefill_chunk_size=32, max_decode_batch_size=4)


# Two seeds for `auto`, which replays forecasts and takes ten times as long: it schedules by the rules of the others.
@pytest.mark.parametrize("workers", [(1, 1), (1, 2)])
@pytest.mark.parametrize(("mode", "seed"), [(mode, i) for mode in MODES for i in range(2 if mode == "auto" else 6)])
def test_all_requests_are_served_completely_and_reproducibly(
    mode: SimMode, seed: int, workers: tuple[int, int]
) -> None:
    """With a pool so small that requests are preempted: every answer is complete, in order, and reproducible."""
    trace = drawn_trace(seed)
    timelines, simulation = run(mode, trace, kv_budget=KVBudget(14, 16), scheduler=SMALL, workers=workers)
    for asked, got in zip(trace, timelines, strict=True):
        assert got.first_token_s is not None and got.last_token_s is not None
        assert asked.arrival_s < got.first_token_s <= got.last_token_s
        assert len(got.gaps_s) == asked.num_output_tokens - 1
        assert sum(got.gaps_s) == pytest.approx(got.last_token_s - got.first_token_s)
    assert not simulation.cluster.num_live
    for worker in simulation.cluster.workers:
        stats = worker.scheduler.get_stats() if isinstance(worker.scheduler, PDScheduler) else {}
        assert stats.get("kv_blocks_used", 0) == 0, "all blocks are free at the end"
    assert timelines == run(mode, trace, kv_budget=KVBudget(14, 16), scheduler=SMALL, workers=workers)[0]


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
    monkeypatch.setattr(PDScheduler, "schedule", lambda self: ScheduleOutput())
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
