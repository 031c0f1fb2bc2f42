"""Search for the deployment with the highest rate of requests within an objective.

The capacity of a deployment is the highest rate at which a share of the requests of a trace, 90 % by default, meet the
objective (the goodput of DistServe, arXiv 2401.09670), found by bisection with the simulator. The search avoids most of
it: requests served alone bound what a deployment can reach; a prefix of the trace ranks the candidates; and one
that misses the objective at the best rate so far has a lower capacity, by one simulation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepCostModel, StepWork
from sageLLM.runtime.sim.cluster import MakeCluster
from sageLLM.runtime.sim.metrics import Slo, Timeline
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import TraceRequest

Form = Literal["together", "disaggregated", "attention_ffn"]
FORMS: tuple[Form, ...] = ("together", "disaggregated", "attention_ffn")
STEP = 1.02
"""Rates are powers of it, times that of the trace, so that capacities of different candidates are comparable."""
PREFIX = 0.5
MIN_REQUESTS = 40
"""The share of the trace that ranks the candidates, and the least number of requests, in which queues can grow."""
MARGIN = 0.5
"""Candidates with this share of the best capacity in the prefix are simulated on the whole trace."""
NOISE = 4
"""Steps below the best capacity that a candidate must miss, too, to be dropped."""
STEPS_ABOVE = (1, 2, 3, 5, 8, 13)
"""Steps above a capacity at which a better candidate must meet the objective at least once."""
MAX_EXPONENT = 1200
NUM_CHECKS = 24
"""Times at which a simulation may end early."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A deployment: its name, its form, its devices, a factory of its workers, and costs that bound its service.

    `prefill` and `decode` are the costs of the workers that compute a prompt and its decodes.
    """

    name: str
    form: Form
    num_devices: int
    make_cluster: Callable[[], MakeCluster]
    prefill: StepCostModel
    decode: StepCostModel


@dataclass(frozen=True, slots=True)
class Capacity:
    """The capacity of a candidate: the power of STEP, and requests per second."""

    candidate: Candidate
    exponent: int
    rate: float


@dataclass(slots=True)
class Search:
    """A search for a trace and an objective; counts the requests that it simulates."""

    trace: Sequence[TraceRequest]
    slo: Slo
    target: float = 0.9
    num_simulated: int = 0
    _served: dict[tuple[str, int, int], bool] = field(default_factory=dict)

    def run(self, candidates: Sequence[Candidate]) -> list[Capacity]:
        """The capacities of the best candidate and of the best of each form, the highest first.

        Raises ValueError if no candidate can reach the target.
        """
        possible = self._possible(candidates)
        num = min(len(self.trace), max(MIN_REQUESTS, round(PREFIX * len(self.trace))))
        ranked = self._ranked(possible, num)
        found = [one for form in FORMS if (one := self._best(ranked, form)) is not None]
        return sorted(found, key=lambda one: one.exponent, reverse=True)

    def exhaustive(self, candidates: Sequence[Candidate]) -> list[Capacity]:
        """The capacities of all candidates that can reach the target, the highest first."""
        found = [self.capacity(one, len(self.trace)) for one in self._possible(candidates)]
        return sorted(found, key=lambda one: one.exponent, reverse=True)

    def better(self, candidates: Sequence[Candidate], known: Capacity) -> list[Capacity]:
        """The capacities above a known one, the highest first; each candidate is tried at several rates above it.

        It costs less than `exhaustive`: simulations of a candidate that is worse end early.
        """
        found = list[Capacity]()
        for one in self._possible(candidates):
            if any(self.is_served(one, known.exponent + steps, len(self.trace)) for steps in STEPS_ABOVE):
                found.append(self.capacity(one, len(self.trace)))
        return sorted(
            (one for one in found if one.exponent > known.exponent), key=lambda one: one.exponent, reverse=True
        )

    def capacity(self, candidate: Candidate, num_requests: int, start: int = 0) -> Capacity:
        """The capacity in the first requests of the trace, by doubling steps from `start` on, and bisection.

        The whole trace is always searched from the same start, so that the same candidate has the same capacity.
        """
        low, high, stride = start, start, 8
        if self.is_served(candidate, start, num_requests):
            while high < MAX_EXPONENT and self.is_served(candidate, high := low + stride, num_requests):
                low, stride = high, 2 * stride
        else:
            while low > -MAX_EXPONENT and not self.is_served(candidate, low := high - stride, num_requests):
                high, stride = low, 2 * stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.is_served(candidate, middle, num_requests) else (low, middle)
        return Capacity(candidate, low, STEP**low * len(self.trace) / (self.trace[-1].arrival_s or 1.0))

    def is_served(self, candidate: Candidate, exponent: int, num_requests: int) -> bool:
        """Whether enough of the first requests meet the objective at a rate."""
        key = candidate.name, exponent, num_requests
        if key not in self._served:
            scale = STEP**-exponent
            trace = [replace(one, arrival_s=one.arrival_s * scale) for one in self.trace[:num_requests]]
            self._served[key] = meets(candidate, trace, self.slo, self.target)
            self.num_simulated += num_requests
        return self._served[key]

    def _possible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that can reach the target at some rate, by their bounds."""
        if not candidates:
            raise ValueError("expected a deployment in which the model fits the devices; raise --devices or --max-pp")
        bounds = {one.name: attainment_bound(one, self.trace, self.slo) for one in candidates}
        most = max(bounds.values())
        if most < self.target:
            raise ValueError(
                f"at most {100 * most:.1f} % of the requests can meet the objective, even one by one; relax --slo-ttft "
                f"or --slo-tpot, or lower --attainment from {self.target:g}"
            )
        return [one for one in candidates if bounds[one.name] >= self.target]

    def _ranked(self, candidates: Sequence[Candidate], num_requests: int) -> list[Capacity]:
        """Candidates with their capacities in a prefix, the highest first; those far below the best are left out.

        Far below is decided by one simulation at a share of the best capacity so far of the form.
        """
        best: dict[Form, int] = {}
        found: list[Capacity] = []
        for one in candidates:
            start = max(best.values(), default=0)
            if one.form in best and not self.is_served(one, best[one.form] + _MARGIN_STEPS, num_requests):
                continue
            capacity = self.capacity(one, num_requests, start)
            best[one.form] = max(best.get(one.form, -MAX_EXPONENT), capacity.exponent)
            found.append(capacity)
        kept = [one for one in found if one.exponent >= best[one.candidate.form] + _MARGIN_STEPS]
        return sorted(kept, key=lambda one: one.exponent, reverse=True)

    def _best(self, ranked: Sequence[Capacity], form: Form) -> Capacity | None:
        """The best candidate of a form on the whole trace.

        A candidate that misses the objective at the best rate so far, and a little below, is dropped: the share of
        requests within the objective does not quite fall with the rate, as requests meet others in other steps.
        """
        best: Capacity | None = None
        num = len(self.trace)
        for candidate in (one.candidate for one in ranked if one.candidate.form == form):
            rates = () if best is None else (best.exponent + 1, best.exponent - NOISE)
            if not rates or any(self.is_served(candidate, exponent, num) for exponent in rates):
                found = self.capacity(candidate, num)
                best = found if best is None or found.exponent > best.exponent else best
        return best


_MARGIN_STEPS = round(math.log(MARGIN) / math.log(STEP))


def meets(candidate: Candidate, trace: Sequence[TraceRequest], slo: Slo, target: float) -> bool:
    """Whether a share of the requests meets the objective, by a simulation that ends when that is certain."""
    least = target * len(trace)
    last = trace[-1].arrival_s

    def is_certain(timelines: Sequence[Timeline], now_s: float) -> bool:
        num_missed = sum(_is_missed(one, slo, now_s) for one in timelines)
        return len(timelines) - num_missed < least

    times = [last * i / NUM_CHECKS for i in range(1, NUM_CHECKS + 1)] + [last + slo.ttft_s, last + 2 * slo.ttft_s]
    timelines = Simulation(candidate.make_cluster()).run(trace, is_certain, times)
    return sum(slo.is_met(one) for one in timelines) >= least


def _is_missed(one: Timeline, slo: Slo, now_s: float) -> bool:
    """Whether a request has missed the objective for certain: it waits too long, or has taken too long."""
    if one.arrival_s > now_s:
        return False
    if one.first_token_s is None:
        return now_s - one.arrival_s > slo.ttft_s
    if one.ttft_s > slo.ttft_s:
        return True
    end_s = one.last_token_s if one.last_token_s is not None else now_s
    return end_s - one.first_token_s > slo.tpot_s * (one.num_output_tokens - 1)


def attainment_bound(candidate: Candidate, trace: Sequence[TraceRequest], slo: Slo) -> float:
    """An upper bound on the share of requests within the objective: that of requests which are served alone.

    The time of a prompt, and of a decode, grows with its length, so the longest length in time is found by bisection.
    """
    if any(one.block_hashes for one in trace):  # a prompt may be in the cache
        return 1.0
    prompts = sorted(one.num_prompt_tokens for one in trace)
    num_first = _num_until(prompts, lambda n: candidate.prefill.step_s(StepWork([PromptChunk(0, n)])) <= slo.ttft_s)
    num_decoded = _num_until(prompts, lambda n: candidate.decode.step_s(StepWork((), 1, n)) <= slo.tpot_s)
    return min(num_first, num_decoded) / len(prompts)


def _num_until(values: Sequence[int], holds: Callable[[int], bool]) -> int:
    """The number of the first values, in order, for which a condition holds that fails for all after a failure."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if holds(values[middle]):
            low = middle + 1
        else:
            high = middle
    return low
