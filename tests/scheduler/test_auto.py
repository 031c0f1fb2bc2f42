"""Mode `auto`: forecasts computed by hand, and the choices that follow from them."""

import math

import pytest

from sageLLM.runtime.scheduler import auto
from sageLLM.runtime.scheduler.auto import (
    DEFAULT_OUTPUT_TOKENS,
    MAX_EXPECTED,
    MIN_GAIN,
    NUM_NEXT,
    PARTIAL_CREDIT,
    ForecastChooser,
    Score,
    best_rule,
    expected,
    mean_output_tokens,
    num_left,
    rules,
    score,
)
from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.scheduler.forecast import (
    ExpectedRequest,
    Forecast,
    Served,
    ServiceLimits,
    ServiceObjective,
)
from sageLLM.runtime.scheduler.modes import ModeChoice
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.step_cost import StepWork

PREFILL, TIME_SHARE = ModeChoice("prefill"), ModeChoice("time_share")
LIMITS = ServiceLimits(max_prefill_tokens=100, max_consecutive_decodes=2, max_batch_size=8)
FIRST, SECOND = ExpectedRequest(0.0, 100, 5), ExpectedRequest(2.5, 200, 2)


class PerToken:
    """1 s for a step with prompts and 10 ms for each of their tokens; 1 s for a step of decodes alone."""

    def step_s(self, work: StepWork) -> float:
        return 1.0 + 0.01 * work.num_prompt_tokens if work.prefill else 1.0


def forecast(rule: ModeChoice, *requests: ExpectedRequest, limits: ServiceLimits = LIMITS) -> list[Served]:
    one = Forecast(rule, requests, PerToken(), limits)
    one.advance(10_000)
    assert one.is_done
    return one.served


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        # 0-2 prompt, 2-3 decode, then 3-7 the second prompt, then decodes
        (PREFILL, Served(2.0, 10.0), Served(7.0, 8.0)),
        # after two decodes a step of prefill: 2-4 decodes, 4-6 prefill, 6-8 decodes (the first ends), 8-10 prefill
        (TIME_SHARE, Served(2.0, 8.0), Served(10.0, 11.0)),
        # steps of 50 prompt tokens and one decode take 1.5 s
        (ModeChoice("hybrid", 50), Served(3.0, 9.0), Served(9.0, 10.0)),
    ],
    ids=["prefill", "time_share", "hybrid"],
)
def test_forecasts_by_hand(rule: ModeChoice, first: Served, second: Served) -> None:
    assert forecast(rule, FIRST, SECOND) == [pytest.approx(first), pytest.approx(second)]


def test_a_forecast_of_time_share_counts_decodes_across_the_end_of_a_request() -> None:
    """0-2 two prompts, 2-3 a decode ends the first; the third prompt came at 2.5 and gets a step after one more."""
    requests = ExpectedRequest(0.0, 50, 2), ExpectedRequest(0.0, 50, 9), ExpectedRequest(2.5, 100, 1)
    assert forecast(TIME_SHARE, *requests)[2].first_s == pytest.approx(6.0)


def test_a_forecast_continues_the_requests_in_service() -> None:
    """At 10 s one decodes with 3 of 5 tokens, one has 150 of 200 prompt tokens, and one arrives at 10.5 s."""
    running = ExpectedRequest(2.0, 100, 5, 99, 3, first_s=4.0)
    started = ExpectedRequest(3.0, 200, 2, 150)
    one = Forecast(PREFILL, [running, started, ExpectedRequest(10.5, 100, 1)], PerToken(), LIMITS, start_s=10.0)
    one.advance(100)
    # 10-11.5 the rest of the prompt, 11.5-13.5 the new one, then decodes
    assert one.served == [pytest.approx(Served(4.0, 15.5)), pytest.approx(Served(11.5, 14.5)), (13.5, 13.5)]


def test_the_answers_go_on_at_a_given_pace_after_the_prompts() -> None:
    """0-2 the first prompt, 2-3 decode, 3-7 the second; then 3 and 1 more tokens at 0.5 s each, and no third prompt."""
    requests = [FIRST, SECOND, ExpectedRequest(6.0, 300, 4)]
    one = Forecast(PREFILL, requests, PerToken(), LIMITS, num_judged=2, pace_s=0.5)
    assert one.advance(100) == 4
    assert one.is_done and one.served == [pytest.approx(Served(2.0, 8.5)), pytest.approx(Served(7.0, 7.5))]


def test_the_pace_is_that_while_others_arrive() -> None:
    """The first prompt is over at 2 s, the second at 6.5 s in steps of 1.5 s, each with a token of the first."""
    rule = ModeChoice("hybrid", 50)
    requests = [ExpectedRequest(0.0, 50, 9), ExpectedRequest(0.5, 150, 9)]
    one = Forecast(rule, requests, PerToken(), LIMITS, num_judged=1)
    one.advance(100)
    assert one.pace_s == pytest.approx(1.5)  # without others it would be 1
    other = one.with_rule(PREFILL, one.pace_s)
    other.advance(100)
    assert other.rule == PREFILL and other.served == [pytest.approx(Served(1.5, 1.5 + 8 * 1.5))]
    alone = Forecast(rule, requests[:1], PerToken(), LIMITS)
    alone.advance(100)
    assert alone.pace_s == pytest.approx(1.0)


def test_partial_credit_is_less_the_further_a_request_misses() -> None:
    objective = ServiceObjective(1.0, 1000.0)

    def of(ttft: float) -> float:
        one = Forecast(PREFILL, [ExpectedRequest(0.0, 100, 1, 99, 1, first_s=ttft)], PerToken(), LIMITS)
        one.advance(10)
        return score(one, objective).total

    assert [of(1.0), of(2.0), of(5.0)] == [1.0, PARTIAL_CREDIT / 2, PARTIAL_CREDIT / 5]


@pytest.mark.parametrize(("gain", "rule"), [(0.0, PREFILL), (MIN_GAIN - 0.01, PREFILL), (MIN_GAIN + 0.01, TIME_SHARE)])
def test_another_rule_must_be_clearly_better_than_the_first(gain: float, rule: ModeChoice) -> None:
    scores = [Score(PREFILL, [1.0, 0.2]), Score(ModeChoice("hybrid", 256), [0.0, 1.0])]
    assert best_rule([*scores, Score(TIME_SHARE, [1.0, 0.2 + gain])]) == rule


def test_a_forecast_respects_batch_size_and_cache_size() -> None:
    both = ExpectedRequest(0.0, 50, 3), ExpectedRequest(0.0, 50, 3)
    assert [one.first_s for one in forecast(PREFILL, *both)] == [2.0, 2.0]
    one_slot = ServiceLimits(100, 2, 1)
    assert [one.first_s for one in forecast(PREFILL, *both, limits=one_slot)] == [1.5, 5.0]
    small = ServiceLimits(100, 2, 8, max_kv_tokens=80)
    assert [one.first_s for one in forecast(PREFILL, *both, limits=small)] == [1.5, 5.0]


def seen(chooser: ForecastChooser, arrival: float, prompt: int, output: int, is_over: bool) -> None:
    request = Request("r", [1] * prompt, arrival_time=arrival, output_token_ids=[0] * output)
    request.status = RequestStatus.FINISHED if is_over else RequestStatus.DECODING
    chooser.observe(request)


def test_recent_traffic_is_expected_to_continue() -> None:
    objective = ServiceObjective(1.0, 0.2)
    chooser = ForecastChooser(PerToken(), objective)
    seen(chooser, 10.0, 100, 20, is_over=True)
    seen(chooser, 11.0, 200, 40, is_over=False)
    seen(chooser, 14.0, 300, 0, is_over=False)
    live = [one for one in chooser._seen if not one.has_ended]
    live[0].request.first_token_time = 12.0
    live[0].request.compute_up_to(239)
    # 60 tokens came out and one answer ended: the others go on for 60 on average, which takes 12 s, or 6 arrivals
    second, third = num_left(60, 1), num_left(60, 2)
    assert expected(live, chooser._seen, objective, now=20.0) == [
        ExpectedRequest(11.0, 200, 40 + second, 199, 40, 12.0),
        ExpectedRequest(14.0, 300, third),
        ExpectedRequest(22.0, 100, 20),  # a mean gap before the first of the window
        ExpectedRequest(23.0, 200, 40 + second),
        ExpectedRequest(26.0, 300, third),
        ExpectedRequest(28.0, 100, 20),
        ExpectedRequest(29.0, 200, 40 + second),
        ExpectedRequest(32.0, 300, third),
    ]


@pytest.mark.parametrize(("gap_s", "num"), [(1000.0, NUM_NEXT), (0.0, MAX_EXPECTED), (1e-6, MAX_EXPECTED)])
def test_the_number_of_expected_requests_is_bounded(gap_s: float, num: int) -> None:
    chooser = ForecastChooser(PerToken(), ServiceObjective())
    for i in range(3):
        seen(chooser, gap_s * i, 10, 1, is_over=True)
    assert len(expected((), chooser._seen, ServiceObjective(), 5.0)) == num


def test_output_lengths_are_guessed_until_a_request_ends() -> None:
    chooser = ForecastChooser(PerToken(), ServiceObjective())
    seen(chooser, 1.0, 10, 3, is_over=False)
    assert mean_output_tokens(chooser._seen) == DEFAULT_OUTPUT_TOKENS


def test_what_is_left_of_answers_is_spread_around_the_mean() -> None:
    found = sorted(num_left(100, number) for number in range(40, 140))
    assert sum(found) / 100 == pytest.approx(100, rel=0.05)
    assert found[10] == pytest.approx(-100 * math.log(0.9), abs=2) and found[-10] == pytest.approx(230, abs=15)
    assert num_left(1, 0) == 1


def test_a_bounded_number_of_steps_is_computed_per_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice stays the same until all forecasts are done."""
    monkeypatch.setattr(auto, "STEPS_PER_CHOICE", 5)
    steps: list[StepWork] = []

    class Counted(PerToken):
        def step_s(self, work: StepWork) -> float:
            steps.append(work)
            return super().step_s(work)

    chooser = ForecastChooser(Counted(), ServiceObjective(0.5, 1.05))
    one = scheduler(chooser)
    for i in range(8):
        seen(chooser, 0.1 * i, 300, 0, is_over=False)
    first = chooser.choose(one.view)
    assert chooser._pending
    while chooser._pending:
        steps.clear()
        choice = chooser.choose(one.view)
        assert len(steps) <= 5 and (choice == first or not chooser._pending)


def scheduler(chooser: ForecastChooser) -> PDScheduler:
    config = PDSchedulerConfig(mode="auto", max_prefill_tokens=600, prefill_chunk_size=40)
    return PDScheduler(config, kv_budget=KVBudget(100, 16), mode_chooser=chooser)


def test_the_rules_are_within_the_limits() -> None:
    kinds = [
        (rule.mode, rule.max_prefill_tokens)
        for rule in rules(scheduler(ForecastChooser(PerToken(), ServiceObjective())).view)
    ]
    chunks = [("hybrid", size) for size in (40, 256, 512, 600)]
    assert kinds == [("prefill", None), ("time_share", None), *chunks]


@pytest.mark.parametrize(
    ("objective", "mode"),
    [(ServiceObjective(4.0, 1000.0), "prefill"), (ServiceObjective(1000.0, 1.05), "hybrid")],
    ids=["first tokens matter", "pace matters"],
)
def test_the_objective_decides(objective: ServiceObjective, mode: str) -> None:
    """With the first objective new prompts go first; with the other they may delay the decodes only a little."""

    class Cost:
        def step_s(self, work: StepWork) -> float:
            return 0.01 * work.num_prompt_tokens + (1.0 if work.num_decodes else 0.0)

    chooser = ForecastChooser(Cost(), objective)
    for i in range(16):
        seen(chooser, 5.0 * i, 300, 20, is_over=True)
    one = scheduler(chooser)
    choices = [chooser.choose(one.view) for _ in range(200)]
    assert choices[-1].mode == mode


@pytest.mark.parametrize(("tpot_s", "chunk_size"), [(100.0, 600), (4.0, 256), (1.4, 40), (0.1, 40)])
def test_until_there_is_a_forecast_steps_are_as_large_as_the_pace_allows(tpot_s: float, chunk_size: int) -> None:
    """A step of n prompt tokens takes 1 + n / 100 s."""
    chooser = ForecastChooser(PerToken(), ServiceObjective(1.0, tpot_s))
    assert chooser.choose(scheduler(chooser).view) == ModeChoice("hybrid", chunk_size)


def test_requests_are_served_under_every_choice(fake_engine) -> None:
    engine = fake_engine(scheduler(ForecastChooser(PerToken(), ServiceObjective(5.0, 2.0), window=8)))
    requests = [engine.add(f"r{i}", 3 + 17 * i, num_outputs=6) for i in range(20)]
    engine.run_to_end()
    assert all(request.output_token_ids == engine.expected_output(request) for request in requests)


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_objective_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError) as error:
        ServiceObjective(**{name: value})
    assert str(error.value) == f"{name} must be a positive number of seconds, got {value}"
