"""Serving metrics of a simulation: TTFT, TPOT, SLO attainment and goodput."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Timeline:
    """Times of one request in seconds: arrival, first token, last token, and the gaps between its tokens."""

    number: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    first_token_s: float | None = None
    last_token_s: float | None = None
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    num_preemptions: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to first token; infinite without a token."""
        return np.inf if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token, infinite for an unfinished one."""
        if self.first_token_s is None or self.last_token_s is None:
            return np.inf
        num_gaps = self.num_output_tokens - 1
        return (self.last_token_s - self.first_token_s) / num_gaps if num_gaps else 0.0

    @property
    def e2e_s(self) -> float:
        """Arrival to last token; infinite for an unfinished request."""
        return np.inf if self.last_token_s is None else self.last_token_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Slo:
    """A service level objective in seconds: time to first token, and mean time per output token after it."""

    ttft_s: float
    tpot_s: float

    def is_met(self, timeline: Timeline) -> bool:
        """Whether the request met both."""
        return timeline.ttft_s <= self.ttft_s and timeline.tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Summary:
    """Metrics of a simulation. Times are in seconds by percentile, rates per second of simulated time.

    `attainment` is the share of all requests that met the objective, `goodput` the number of those per second. `tbt`
    (time between tokens) is over all gaps between consecutive tokens of a request.
    """

    num_requests: int
    num_finished: int
    num_refused: int
    duration_s: float
    ttft: dict[int, float]
    tpot: dict[int, float]
    tbt: dict[int, float]
    e2e: dict[int, float]
    mean_ttft: float
    mean_tpot: float
    output_throughput: float
    attainment: float
    goodput: float
    num_preemptions: int
    num_steps: int

    @classmethod
    def of(cls, timelines: Sequence[Timeline], slo: Slo, num_steps: int) -> Summary:
        """The metrics of all requests, including those that were never served."""
        done = [one for one in timelines if one.last_token_s is not None]
        duration = max((one.last_token_s or 0.0 for one in done), default=0.0)
        num_good = sum(slo.is_met(one) for one in timelines)
        num_output = sum(one.num_output_tokens for one in done)
        ttfts, tpots = [one.ttft_s for one in done], [one.tpot_s for one in done if one.num_output_tokens > 1]
        return cls(
            num_requests=len(timelines),
            num_finished=len(done),
            num_refused=len(timelines) - len(done),
            duration_s=duration,
            ttft=percentiles(ttfts),
            tpot=percentiles(tpots),
            tbt=percentiles([gap for one in done for gap in one.gaps_s]),
            e2e=percentiles([one.e2e_s for one in done]),
            mean_ttft=_mean(ttfts),
            mean_tpot=_mean(tpots),
            output_throughput=num_output / duration if duration else 0.0,
            attainment=num_good / len(timelines) if timelines else 0.0,
            goodput=num_good / duration if duration else 0.0,
            num_preemptions=sum(one.num_preemptions for one in timelines),
            num_steps=num_steps,
        )


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The PERCENTILES of the values, interpolated; 0 without values."""
    if not values:
        return dict.fromkeys(PERCENTILES, 0.0)
    return {p: float(q) for p, q in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
