"""Requests within an objective at rising rates, on an engine that runs: the goodput of its mode."""

from __future__ import annotations

import itertools
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from disaggregation import Clock

PROMPT_LEN, NUM_TOKENS = 256, 24
RATES = (2.0, 4.0, 8.0, 16.0)
DRAIN_SECONDS = 4.0
"""Requests that are not complete so long after the last arrival have missed the objective."""


class Objective(NamedTuple):
    """Seconds to the first token, the mean time between tokens, and the longest time between two tokens."""

    ttft_s: float = 1.5
    tpot_s: float = 0.1
    gap_s: float = 0.25


def measure_rates(clock: Clock, seconds: float) -> dict[str, Any]:
    """By the rate: requests per second that arrived, that met the objective but for its longest gap, and all of it."""
    clock.add("warm-up", list(range(3, 3 + PROMPT_LEN)), 4)
    while clock.engine.has_work:
        clock.step()
    found = {}
    for rate in RATES:
        names = _serve(clock, rate, seconds)
        times = [clock.times[name] for name in names]
        met = [[_meets(one, Objective()._replace(**limit)) for one in times] for limit in ({"gap_s": 1e9}, {})]
        found[f"{rate:g}/s"] = [round(sum(one) / seconds, 2) for one in ([True] * len(names), *met)]
    return found


def _serve(clock: Clock, rate: float, seconds: float) -> list[str]:
    """The names of requests that arrive at random for so long; those that take too long are aborted."""
    draw, arrivals, now = random.Random(int(rate * 100)), list[float](), 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        arrivals.append(now)
    start = time.perf_counter()
    names: list[str] = []
    while (now := time.perf_counter() - start) < seconds + DRAIN_SECONDS:
        while len(names) < len(arrivals) and arrivals[len(names)] <= now:
            names.append(f"{rate} {len(names)}")
            clock.add(names[-1], [7 + (draw.randrange(900) + i) % 900 for i in range(PROMPT_LEN)], NUM_TOKENS)
            clock.times[names[-1]] = [start + arrivals[len(names) - 1]]
        if clock.engine.has_work:
            clock.step()
        elif len(names) == len(arrivals):
            break
        else:
            time.sleep(0.001)
    for name in names:
        clock.engine.abort(name)
    return names


def _meets(times: list[float], objective: Objective) -> bool:
    """Whether a request with an arrival and times of tokens is complete and within the objective."""
    if len(times) <= NUM_TOKENS:
        return False
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    mean = sum(gaps) / len(gaps)
    return times[1] - times[0] <= objective.ttft_s and mean <= objective.tpot_s and max(gaps) <= objective.gap_s
