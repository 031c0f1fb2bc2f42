"""Mode chooser for mode `auto`: follows the rule with the best forecast for the requests that it would serve.

No fixed mode is best for all traffic, and hardly for all moments of one (docs/simulate.md has figures). Whenever
requests have arrived, the chooser forecasts (`forecast.py`) the service of those present and the next few under each
rule, from the present state on, and follows the rule under which most of them meet the objective.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sageLLM.runtime.scheduler.forecast import ExpectedRequest, Forecast, ServiceLimits, ServiceObjective
from sageLLM.runtime.scheduler.modes import ModeChoice, SchedulerView
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepCostModel, StepWork

CHUNK_SIZES = (256, 512, 1024, 2048)
DEFAULT_OUTPUT_TOKENS = 128
"""Assumed mean output length until the first request has ended."""
STEPS_PER_CHOICE = 512
"""Coarse forecast steps computed per choice, about 10 us each."""
PARTIAL_CREDIT = 0.5
MIN_GAIN = 0.3
"""Credit by which a rule must exceed the first one: a difference of less is within the errors of the forecasts."""
NUM_NEXT = 4
"""Expected requests by which a rule is judged, besides those present."""
MAX_EXPECTED = 64
"""Expected requests in a forecast at most."""
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Score(NamedTuple):
    """Result of a forecast: the credit of each request that the rule is judged by."""

    rule: ModeChoice
    credits: list[float]

    @property
    def total(self) -> float:
        return sum(self.credits)

    @property
    def is_full(self) -> bool:
        """Whether all requests meet the objective, so that no other rule is better."""
        return all(credit == 1 for credit in self.credits)


class _Seen(NamedTuple):
    """A request that arrived; its output length is known once it has finished. `number` is the order of arrival."""

    number: int
    arrival_s: float
    num_prompt_tokens: int
    request: Request

    @property
    def has_ended(self) -> bool:
        return self.request.status is RequestStatus.FINISHED


class ForecastChooser:
    """Follows the rule with the best forecast for the requests present and the next few.

    The next ones are expected to be like the latest `window` requests. A rule is followed for a short time only, as the
    next request is the occasion for new forecasts. So the forecasts of the others end once the requests in question
    have their first tokens: their answers go on at the pace of `first_rule`, which suits the objective in the long run.
    It is also preferred unless another one is clearly better.

    Forecasts are computed incrementally, a bounded amount of work per choice.
    """

    def __init__(self, cost: StepCostModel, objective: ServiceObjective, window: int = 64) -> None:
        self._cost = cost
        self._objective = objective
        self._seen: deque[_Seen] = deque(maxlen=window)
        self._live: list[_Seen] = []
        self._num_seen = 0
        self._has_new = False
        self._first_rule: ModeChoice | None = None
        self._rule: ModeChoice | None = None
        self._pending: list[Forecast] = []
        self._scores: list[Score] = []

    def observe(self, request: Request) -> None:
        """Remember a request."""
        one = _Seen(self._num_seen, request.arrival_time, request.num_prompt_tokens, request)
        self._num_seen += 1
        self._seen.append(one)
        self._live.append(one)
        self._has_new = True

    def choose(self, view: SchedulerView) -> ModeChoice:
        """The mode of the next step."""
        if self._rule is None or self._first_rule is None:
            self._rule = self._first_rule = first_rule(view, self._cost, self._objective)
        if self._has_new and not self._pending and len(self._seen) > 1:
            self._has_new = False
            self._pending = [self._begin(view, self._first_rule)]
        if self._pending:
            self._advance(view)
            if not self._pending:
                self._rule = best_rule(self._scores)
                self._scores = []
        return self._rule

    def _begin(self, view: SchedulerView, rule: ModeChoice) -> Forecast:
        """The forecast for `first_rule`."""
        self._live = [one for one in self._live if not one.has_ended]
        now = view.clock()
        requests = expected(self._live, self._seen, self._objective, now)
        return Forecast(rule, requests, self._cost, limits_of(view), now, num_judged=len(self._live) + NUM_NEXT)

    def _advance(self, view: SchedulerView) -> None:
        """Compute some steps of the pending forecasts."""
        num_left = STEPS_PER_CHOICE
        while self._pending and num_left:
            forecast = self._pending[-1]
            num_left -= forecast.advance(num_left)
            if not forecast.is_done:
                return
            self._scores.append(score(self._pending.pop(), self._objective))
            if len(self._scores) == 1 and not self._scores[0].is_full:
                others = (rule for rule in rules(view) if rule != forecast.rule)
                self._pending = [forecast.with_rule(rule, forecast.pace_s) for rule in others]


def best_rule(scores: Sequence[Score]) -> ModeChoice:
    """The rule with the largest total, but the first one unless another is better by MIN_GAIN."""
    first = scores[0]
    best = max(scores, key=lambda one: one.total)
    return best.rule if best.total >= first.total + MIN_GAIN else first.rule


def rules(view: SchedulerView) -> list[ModeChoice]:
    """Candidate rules: prefill first, alternating, and mixed steps of several chunk sizes."""
    most = view.config.max_prefill_tokens
    chunk_sizes = sorted({*(size for size in CHUNK_SIZES if size < most), view.config.prefill_chunk_size, most})
    return [ModeChoice("prefill"), ModeChoice("time_share"), *(ModeChoice("hybrid", size) for size in chunk_sizes)]


def first_rule(view: SchedulerView, cost: StepCostModel, objective: ServiceObjective) -> ModeChoice:
    """The rule until there is a forecast: mixed steps, as large as the objective's time per token allows."""
    mixed = [rule for rule in rules(view) if rule.mode == "hybrid"]  # by increasing chunk size
    fitting = [rule for rule in mixed if cost.step_s(_full_step(rule)) <= objective.tpot_s]
    return fitting[-1] if fitting else mixed[0]


def _full_step(rule: ModeChoice) -> StepWork:
    return StepWork([PromptChunk(0, rule.max_prefill_tokens or 0)], num_decodes=1, num_context_tokens=1)


def limits_of(view: SchedulerView) -> ServiceLimits:
    """Limits of the scheduler's worker."""
    config = view.config
    return ServiceLimits(
        config.max_prefill_tokens, config.max_consecutive_decodes, view.max_batch_size, view.max_kv_tokens
    )


def score(forecast: Forecast, objective: ServiceObjective) -> Score:
    """The credits of the requests: 1 for one that meets the objective, else `PARTIAL_CREDIT` / (how far it misses).

    Partial credit matters under overload, where nearly all miss: by the number of those that meet the objective alone,
    a rule with little throughput would win a few requests now and lose those that wait.
    """
    credits: list[float] = []
    for request, one in zip(forecast.requests, forecast.served, strict=False):  # the judged ones are the first
        ttft = (one.first_s - request.arrival_s) / objective.ttft_s
        tpot = (one.last_s - one.first_s) / max(1, request.num_output_tokens - 1) / objective.tpot_s
        missed_by = max(ttft, tpot)
        credits.append(1.0 if missed_by <= 1 else PARTIAL_CREDIT / missed_by)
    return Score(forecast.rule, credits)


def expected(
    live: Iterable[_Seen], seen: Sequence[_Seen], objective: ServiceObjective, now: float
) -> list[ExpectedRequest]:
    """Expected traffic: the requests that are being served, and then the latest ones again, at the same intervals.

    There are as many new ones as arrive while an answer is generated at the objective's pace: without them the answers
    in service would seem to end fast after the next few prompts.
    """
    mean = mean_output_tokens(seen)
    requests = [_in_service(one, mean) for one in live]
    gap_s = (seen[-1].arrival_s - seen[0].arrival_s) / (len(seen) - 1)
    lifetime_s = mean * objective.tpot_s
    num = max(NUM_NEXT, min(MAX_EXPECTED, int(lifetime_s / gap_s) if gap_s > 0 else MAX_EXPECTED))
    arrival_s = now
    for i in range(num):
        position = (i - num) % len(seen)
        one = seen[position]
        arrival_s += one.arrival_s - seen[position - 1].arrival_s if position else gap_s
        num_tokens = len(one.request.output_token_ids) + (0 if one.has_ended else num_left(mean, one.number))
        requests.append(ExpectedRequest(arrival_s, one.num_prompt_tokens, max(1, num_tokens)))
    return requests


def mean_output_tokens(seen: Sequence[_Seen]) -> int:
    """The mean output length, estimated as for censored lifetimes: all output tokens so far per request that ended."""
    num_ended = sum(one.has_ended for one in seen)
    if not num_ended:
        return DEFAULT_OUTPUT_TOKENS
    return max(1, sum(len(one.request.output_token_ids) for one in seen) // num_ended)


def num_left(mean: int, number: int) -> int:
    """The output tokens that a request that has not ended will still generate.

    The estimate of the mean takes lifetimes to be exponential, so what is left does not depend on what was generated.
    The requests have different quantiles, evenly spread over any of successive numbers: with the mean for all, none
    would have a short answer, whose pace cannot recover from a delay.
    """
    quantile = (0.5 + number * GOLDEN_RATIO) % 1
    return max(1, round(-math.log(1 - quantile) * mean))


def _in_service(one: _Seen, mean: int) -> ExpectedRequest:
    request = one.request
    num_generated = len(request.output_token_ids)
    return ExpectedRequest(
        one.arrival_s,
        one.num_prompt_tokens,
        num_generated + num_left(mean, one.number),
        min(request.num_computed_tokens, one.num_prompt_tokens - 1),
        num_generated,
        request.first_token_time if num_generated else None,
    )
