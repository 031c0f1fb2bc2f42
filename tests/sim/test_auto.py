"""Mode `auto` compared with the fixed modes, over loads and objectives that favour different fixed modes."""

import importlib.util
import sys
from pathlib import Path

import pytest

from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.scheduler.forecast import ExpectedRequest, Forecast, ServiceLimits, ServiceObjective
from sageLLM.runtime.scheduler.modes import ModeChoice
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import CoefficientCost, Coefficients, StepCostModel
from sageLLM.runtime.sim.metrics import Slo, Summary
from sageLLM.runtime.sim.modes import Setup, SimMode, make_cluster
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import Lengths, TraceRequest, synthetic

from .workloads import ARXIV, SHAREGPT, yi_34b

CHAT = Lengths(700, 1400, 1800), Lengths(180, 480, 1000)
OVERHEAD = (2.0, 1e-4)
OPT_13B = CoefficientCost(
    Coefficients((23.1, 0.1405, 8.08e-6), (23.5, 5.93e-4, 0.0607), (20.2, 4.91e-4, 0.12), 95, OVERHEAD, OVERHEAD)
)
"""Rounded from DistServe's profile of vLLM on an A100."""


def attainment(
    mode: SimMode, cost: StepCostModel, budget: KVBudget | None, trace: list[TraceRequest], slo: Slo, **limits: int
) -> float:
    objective = ServiceObjective(slo.ttft_s, slo.tpot_s)
    config = PDSchedulerConfig(max_prefill_batch_size=256, max_decode_batch_size=256, **limits)
    setup = Setup(
        cost,
        lambda tokens: 0.0,
        budget,
        num_prefill=1,
        num_decode=0,
        scheduler=config,
        enable_prefix_caching=False,
        objective=objective,
    )
    simulation = Simulation(make_cluster(mode, setup))
    return Summary.of(simulation.run(trace), slo, simulation.num_steps).attainment


@pytest.mark.parametrize(
    ("model", "lengths", "rate", "slo"),
    [
        ("opt", CHAT, 1.0, Slo(0.25, 0.1)),
        ("opt", CHAT, 1.5, Slo(0.25, 0.1)),
        ("opt", CHAT, 1.5, Slo(1.0, 0.05)),
        ("opt", CHAT, 2.0, Slo(2.0, 0.1)),
        ("yi", SHAREGPT, 1.5, Slo(3.0, 0.1)),
        ("yi", ARXIV, 0.5, Slo(3.0, 0.05)),
    ],
)
def test_auto_is_within_2_points_of_the_best_fixed_mode(
    model: str, lengths: tuple[Lengths, Lengths], rate: float, slo: Slo
) -> None:
    cost: StepCostModel = OPT_13B if model == "opt" else yi_34b()
    budget = None if model == "opt" else KVBudget(yi_34b().num_kv_blocks(16))
    trace = synthetic(150, rate, *lengths, seed=0)
    fixed = {
        "prefill first": attainment("time_share", cost, budget, trace, slo, max_consecutive_decodes=0),
        "time_share": attainment("time_share", cost, budget, trace, slo),
        "hybrid": attainment("hybrid", cost, budget, trace, slo),
        "hybrid, large chunks": attainment("hybrid", cost, budget, trace, slo, prefill_chunk_size=2048),
    }
    auto = attainment("auto", cost, budget, trace, slo)
    assert auto >= max(fixed.values()) - 0.02, fixed


@pytest.mark.parametrize("name", ["code | 40 | 3 | 0.5", "conversation | 18 | 1 | 0.3"])
def test_the_regret_is_bounded_from_the_first_100_requests_on(name: str) -> None:
    """Of `benchmarks/auto.py`, which has more loads and longer runs."""
    spec = importlib.util.spec_from_file_location("auto_benchmark", Path(__file__).parents[2] / "benchmarks/auto.py")
    assert spec is not None and spec.loader is not None
    benchmark = sys.modules["auto_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    [load] = [load for load in benchmark.LOADS if name in str(load)]
    modes = ["hybrid", "hybrid 2048", "auto"]  # the others are below these here
    found = {mode: benchmark.play(mode, load, 200, seed=0) for mode in modes}
    assert benchmark.largest_regret(found) <= 2.0


def test_the_forecast_agrees_with_the_simulator() -> None:
    """The simplified scheduler of the chooser compared with the real one."""
    slo = Slo(3.0, 0.05)
    trace = synthetic(100, 0.5, *ARXIV, seed=0)
    cost, budget = yi_34b(), KVBudget(yi_34b().num_kv_blocks(16))
    limits = ServiceLimits(4096, 4, 256, budget.num_blocks * 16)
    requests = [ExpectedRequest(one.arrival_s, one.num_prompt_tokens, one.num_output_tokens) for one in trace]
    for chunk in (256, 512, 2048):
        forecast = Forecast(ModeChoice("hybrid", chunk), requests, cost, limits)
        forecast.advance(10**6)
        gaps = [max(1, one.num_output_tokens - 1) for one in requests]
        good = [
            one.first_s - request.arrival_s <= slo.ttft_s and (one.last_s - one.first_s) / gap <= slo.tpot_s
            for one, request, gap in zip(forecast.served, requests, gaps, strict=True)
        ]
        found = attainment("hybrid", cost, budget, trace, slo, prefill_chunk_size=chunk)
        assert sum(good) / len(good) == pytest.approx(found, abs=0.03)
