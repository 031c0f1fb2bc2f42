"""Mode chooser for mode `auto`: follows the rule with the best forecast for the recent traffic.

No fixed mode is best for all traffic (docs/simulate.md has figures). The chooser remembers the latest requests,
forecasts their service under several rules (`forecast.py`) from time to time, and follows the rule under which most
requests meet the objective.
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
"""Assumed output length until the first request has ended."""
STEPS_PER_CHOICE = 512
"""Coarse forecast steps computed per choice, about 10 us each."""
MIN_STANDARD_ERRORS = 1.64
"""A rule replaces the current one if it is better by more standard errors of the difference (one-sided, 95 %)."""
NUM_RENEWALS = 8
"""Forecasts per window of requests."""
PARTIAL_CREDIT = 0.5
NUM_LIFETIMES = 4
"""Requests in a forecast, as a multiple of those served concurrently when all just meet the objective."""


class Score(NamedTuple):
    """Result of a forecast; the one with the largest `total`, then the smallest `used`, is the best."""

    rule: ModeChoice
    credits: list[float]
    used: float

    @property
    def total(self) -> float:
        return sum(self.credits)


class _Seen(NamedTuple):
    """A request that arrived; its output length is known once it has finished."""

    arrival_s: float
    num_prompt_tokens: int
    request: Request


class ForecastChooser:
    """Follows the rule with the best forecast for traffic like the latest `window` requests.

    New forecasts are due when an eighth of the remembered requests are new: often at first, rarely later. They are
    computed incrementally, a bounded amount of work per choice.
    """

    def __init__(self, cost: StepCostModel, objective: ServiceObjective, window: int = 128) -> None:
        self._cost = cost
        self._objective = objective
        self._window = window
        self._seen: deque[_Seen] = deque(maxlen=window)
        self._live: dict[str, Request] = {}
        self._num_new = 0
        self._rule: ModeChoice | None = None
        self._pending: list[Forecast] = []
        self._num_repeats = 1.0  # of each remembered request in the forecasts
        self._scores: list[Score] = []

    def observe(self, request: Request) -> None:
        """Remember a request."""
        self._seen.append(_Seen(request.arrival_time, request.num_prompt_tokens, request))
        self._live[request.request_id] = request
        self._num_new += 1

    def choose(self, view: SchedulerView) -> ModeChoice:
        """The mode of the next step."""
        if self._rule is None:
            self._rule = first_rule(view, self._cost, self._objective)
        if self._pending:
            self._advance()
        elif self._num_new * NUM_RENEWALS >= len(self._seen) > 1:
            self._begin(view)
        return self._rule

    def _begin(self, view: SchedulerView) -> None:
        self._num_new = 0
        self._live = {i: one for i, one in self._live.items() if one.status is not RequestStatus.FINISHED}
        now = view.clock()
        requests = expected(self._live.values(), self._seen, self._objective, self._window, now)
        self._num_repeats = max(1.0, len(requests) / len(self._seen))
        limits = limits_of(view)
        self._pending = [Forecast(rule, requests, self._cost, limits, now) for rule in rules(view)]

    def _advance(self) -> None:
        forecast = self._pending[-1]
        forecast.advance(STEPS_PER_CHOICE)
        if not forecast.is_done:
            return
        self._pending.pop()
        self._scores.append(score(forecast, self._objective))
        if not self._pending:
            best = max(self._scores, key=lambda one: (one.total, -one.used))
            current = next(one for one in self._scores if one.rule == self._rule)
            if is_better(best, current, self._num_repeats):
                self._rule = best.rule
            self._scores = []


def is_better(one: Score, other: Score, num_repeats: float) -> bool:
    """Whether the difference of two rules exceeds its standard error over requests enough to change the rule.

    The next requests are others than the remembered ones. A rule that is ahead by one request of a quiet time would be
    replaced in vain, and perhaps by one that does not stand the next burst. `num_repeats` is how often each remembered
    request is in the forecasts: repetitions are no evidence.
    """
    differences = [a - b for a, b in zip(one.credits, other.credits, strict=True)]
    error = math.sqrt(num_repeats * sum(x * x for x in differences))
    return sum(differences) > MIN_STANDARD_ERRORS * error


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
    a rule with little throughput would win a few requests now and lose those that wait. Ties are broken by the total
    time relative to the objective.
    """
    credits: list[float] = []
    used = 0.0
    for request, one in zip(forecast.requests, forecast.served, strict=True):
        ttft = (one.first_s - request.arrival_s) / objective.ttft_s
        tpot = (one.last_s - one.first_s) / max(1, request.num_output_tokens - 1) / objective.tpot_s
        missed_by = max(ttft, tpot)
        credits.append(1.0 if missed_by <= 1 else PARTIAL_CREDIT / missed_by)
        used += missed_by
    return Score(forecast.rule, credits, used)


def expected(
    live: Iterable[Request], seen: Sequence[_Seen], objective: ServiceObjective, least: int, now: float
) -> list[ExpectedRequest]:
    """Expected traffic: the requests that are being served, and then those seen, repeated periodically.

    At least `least` new requests, and several times as many as are served concurrently. A request that has not ended is
    assumed to continue for the mean output length, which is estimated as for censored lifetimes: all output tokens so
    far divided by the number of requests that ended.
    """
    lengths = [len(one.request.output_token_ids) for one in seen]
    has_ended = [one.request.status is RequestStatus.FINISHED for one in seen]
    mean = max(1, sum(lengths) // sum(has_ended)) if any(has_ended) else DEFAULT_OUTPUT_TOKENS
    first, last = min(one.arrival_s for one in seen), max(one.arrival_s for one in seen)
    gap_s = (last - first) / max(1, len(seen) - 1)
    once = sorted(
        ExpectedRequest(
            now + gap_s + one.arrival_s - first, one.num_prompt_tokens, max(1, length + (0 if ended else mean))
        )
        for one, length, ended in zip(seen, lengths, has_ended, strict=True)
    )
    lifetime_s = objective.ttft_s + mean * objective.tpot_s
    num = min(max(least, int(NUM_LIFETIMES * lifetime_s / gap_s) if gap_s else least), 4 * least)
    rounds = -(-num // len(once))
    period_s = gap_s * len(seen)
    new = [one._replace(arrival_s=one.arrival_s + i * period_s) for i in range(rounds) for one in once][:num]
    return [_in_service(request, mean) for request in live] + new


def _in_service(request: Request, mean: int) -> ExpectedRequest:
    num_generated = len(request.output_token_ids)
    return ExpectedRequest(
        request.arrival_time,
        request.num_prompt_tokens,
        num_generated + mean,
        min(request.num_computed_tokens, request.num_prompt_tokens - 1),
        num_generated,
        request.first_token_time if num_generated else None,
    )
