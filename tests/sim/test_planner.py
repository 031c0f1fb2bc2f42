"""The planner: bounds, capacities, its choice against an exhaustive search, and the spec that it writes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from plan_cases import make_case, outcome
from typer.testing import CliRunner

from sageLLM.runtime.cli.deploy_file import find_placement
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import CoefficientCost, Coefficients, StepCostModel
from sageLLM.runtime.sim.metrics import Slo
from sageLLM.runtime.sim.modes import RoleSetup, Setup, make_cluster
from sageLLM.runtime.sim.plan_candidates import Space
from sageLLM.runtime.sim.planner import STEP, Candidate, Search, attainment_bound, meets
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import TraceRequest, poisson_arrivals

SLO = Slo(ttft_s=0.4, tpot_s=0.05)


def cost(scale: float = 1.0) -> CoefficientCost:
    """10 ms per prompt and 0.1 ms for each of its tokens; 10 ms per decode step."""
    decode = (10.0 * scale, 0.0, 0.1 * scale)
    return CoefficientCost(Coefficients((10.0 * scale, 0.1 * scale, 0.0), decode, decode, 64))


def trace(num: int = 60, prompt: int = 500, output: int = 8) -> list[TraceRequest]:
    return [TraceRequest(when, prompt, output) for when in poisson_arrivals(num, 4.0, 0)]


def together(name: str, one: StepCostModel, num_workers: int = 1) -> Candidate:
    setup = Setup(one, lambda _: 0.0, scheduler=PDSchedulerConfig(), num_workers=num_workers)
    return Candidate(name, "together", num_workers, lambda: make_cluster("hybrid", setup), one, one)


@dataclass(frozen=True)
class Workers:
    """Workers of 1 / tp of the time; more than `max_tp` devices are not possible."""

    max_tp: int = 2

    def worker(self, tp: int, pp: int) -> RoleSetup | None:
        return RoleSetup(cost(1 / tp)) if tp <= self.max_tp else None

    def transfer_s(self, tp: int, num_tokens: int) -> float:
        return 0.001

    def attention_ffn(self, num_attention: int, num_ffn: int, num_ubatches: int) -> RoleSetup | None:
        return None


def test_the_space_uses_all_devices() -> None:
    found = Space(4, (1, 2), Workers(), PDSchedulerConfig()).candidates()
    assert {candidate.num_devices for candidate, _ in found.values()} == {4}
    assert "time_share: both 2 x tp2" in found and "hybrid 512: both 4 x tp1" in found
    pairs = {name for name in found if name.startswith("strict")}
    assert pairs == {
        *(f"strict: prefill {n} x tp1, decode {4 - n} x tp1" for n in (1, 2, 3)),
        *("strict: prefill 2 x tp1, decode 1 x tp2", "strict: prefill 1 x tp2, decode 2 x tp1"),
        "strict: prefill 1 x tp2, decode 1 x tp2",
    }


def test_the_capacity_is_the_last_rate_that_meets_the_objective() -> None:
    search = Search(trace(), SLO)
    one = together("one", cost())
    found = search.capacity(one, 60)
    assert search.is_served(one, found.exponent, 60) and not search.is_served(one, found.exponent + 1, 60)
    assert found.rate == pytest.approx(STEP**found.exponent * 60 / search.trace[-1].arrival_s)
    assert search.is_served(one, -400, 60)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_simulation_that_ends_early_decides_as_the_whole_one(scale: float) -> None:
    one = together("one", cost(scale))
    for target in (0.5, 0.9, 1.0):
        timelines = Simulation(one.make_cluster()).run(trace())
        share = sum(SLO.is_met(line) for line in timelines) / len(timelines)
        assert meets(one, trace(), SLO, target) == (share >= target)


def test_the_bound_is_the_share_that_can_be_served_alone() -> None:
    mixed = [*trace(30, prompt=500), *trace(10, prompt=50_000)]
    assert attainment_bound(together("one", cost()), mixed, SLO) == 0.75
    assert attainment_bound(together("one", cost(100.0)), mixed, SLO) == 0.0
    shared = [TraceRequest(0.0, 50_000, 8, block_hashes=(1,))]
    assert attainment_bound(together("one", cost()), shared, SLO) == 1.0


def test_an_objective_that_nothing_reaches_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"at most 0.0 % of the requests can meet the objective, even one by one; relax"
    ):
        Search(trace(), SLO).run([together("one", cost(100.0))])
    with pytest.raises(ValueError, match="expected a deployment in which the model fits the devices"):
        Search(trace(), SLO).run([])


def test_the_choice_is_the_best_with_less_effort() -> None:
    candidates = [candidate for candidate, _ in Space(3, (1, 2), Workers(), PDSchedulerConfig()).candidates().values()]
    search, full = Search(trace(70), SLO), Search(trace(70), SLO)
    chosen, ranked = search.run(candidates), full.exhaustive(candidates)
    assert chosen[0] == ranked[0]
    assert {one.candidate.form for one in chosen} == {"together", "disaggregated"}
    assert search.num_simulated < full.num_simulated


def test_a_held_case(tmp_path: Path) -> None:
    found = outcome(make_case(1, tmp_path, num_requests=30, num_devices=2))
    assert not isinstance(found, str) and found.regret <= 0.02


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., str]:
    make_case(0, tmp_path)

    def run(*arguments: str) -> str:
        config = next(tmp_path.glob("*.json"))
        command = ["plan", "--model", str(config), "--devices", "2", "--rate", "5", "--num-requests", "20", *arguments]
        done = CliRunner().invoke(app, command)
        return done.stdout + done.stderr

    return run


def test_the_command_prints_the_forms_and_writes_a_spec(plan: Callable[..., str], tmp_path: Path) -> None:
    text = plan("--form", "together", "--form", "disaggregated", "--out", str(tmp_path / "best.yaml"))
    assert "prefill and decode on different workers: " in text
    assert "% against prefill and decode together." in text
    placement, _ = find_placement(str(tmp_path / "best.yaml"))
    assert placement.num_devices == 2 and placement.hardware == "h100"


def test_the_command_explains_a_form_that_it_does_not_know(plan: Callable[..., str]) -> None:
    assert plan("--form", "tgether").startswith("error: --form must be one of together, disaggregated, attention_ffn")
