"""Forecasts the service of requests under a rule for mixing prefill and decode, in coarse steps.

It is a model of the scheduler that is fast enough to run while serving: without blocks and preemption, and with runs of
equal decode steps merged into one. It serves to rank rules; use the simulator (`runtime/sim`) for accurate figures.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sageLLM.runtime.scheduler.modes import ModeChoice
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepCostModel, StepWork


@dataclass(frozen=True, slots=True)
class ServiceObjective:
    """Service objective in seconds: time to first token, and mean time per further token."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Limits of a worker: prompt tokens per step, decode steps between prefills, requests, tokens of KV."""

    max_prefill_tokens: int
    max_consecutive_decodes: int
    max_batch_size: int
    max_kv_tokens: int | None = None


class ExpectedRequest(NamedTuple):
    """Expected request: arrival in seconds, prompt tokens, output tokens in all.

    One that is being served has computed prompt tokens; one that decodes has generated tokens and the time of its
    first one.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    first_s: float | None = None


class Served(NamedTuple):
    """Times of the first and the last token of a request."""

    first_s: float
    last_s: float


class Forecast:
    """Forecast for requests, in order of arrival, under a rule from the time `start_s` on.

    The worker is idle then, except for the requests that are being served already. Decodes start and end at ticks of a
    decode clock, so a tick need not touch each of them.

    The forecast is about the first `num_judged` requests (None: all) and ends when they are served. With `pace_s` it
    ends when their prompts are computed, and their remaining tokens take that many seconds each.
    """

    def __init__(
        self,
        rule: ModeChoice,
        requests: Sequence[ExpectedRequest],
        cost: StepCostModel,
        limits: ServiceLimits,
        start_s: float = 0.0,
        *,
        num_judged: int | None = None,
        pace_s: float | None = None,
    ) -> None:
        self.rule = rule
        self.requests = requests
        self._cost = cost
        self._limits = limits
        self._num_judged = len(requests) if num_judged is None else num_judged
        self._num_unserved = self._num_judged
        self._is_mixed = rule.mode == "hybrid"
        self._most = min(rule.max_prefill_tokens or limits.max_prefill_tokens, limits.max_prefill_tokens)
        self._max_consecutive_decodes = limits.max_consecutive_decodes if rule.mode == "time_share" else 0
        self._start_s = start_s
        self._given_pace_s = pace_s
        self._prompts_end = start_s, 0  # the time and the tick at which all prompts in question are computed
        self._traffic_end = start_s, 0  # and at which all prompts are
        self._now = start_s
        self._tick = 0
        self._num_since_prefill = 0
        self._num_context_tokens = 0
        self._num_arrived = 0
        self._waiting: deque[int] = deque()
        self._computed: dict[int, int] = {}  # tokens of prompts that began and have not ended
        self._decodes: list[tuple[int, int]] = []
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        for number, request in enumerate(requests):
            if request.first_s is not None:
                self._resume(number, request, request.first_s)

    def with_rule(self, rule: ModeChoice, pace_s: float) -> "Forecast":
        """A forecast for the same requests from the same time on under another rule."""
        return Forecast(
            rule,
            self.requests,
            self._cost,
            self._limits,
            self._start_s,
            num_judged=self._num_judged,
            pace_s=pace_s,
        )

    def _resume(self, number: int, request: ExpectedRequest, first_s: float) -> None:
        """Continue a request that decodes at the start."""
        self._first[number] = first_s
        num_left = max(1, request.num_output_tokens - request.num_generated_tokens)
        heapq.heappush(self._decodes, (num_left, number))
        self._num_context_tokens += request.num_prompt_tokens + request.num_output_tokens - num_left

    @property
    def is_done(self) -> bool:
        """Whether the requests that the forecast is about are served."""
        return not self._num_unserved

    @property
    def served(self) -> list[Served]:
        """The service of those served so far of the requests that the forecast is about, in order of arrival."""
        return [Served(self._first[i], self._last[i]) for i in range(self._num_judged) if i in self._last]

    @property
    def pace_s(self) -> float:
        """Seconds per token after all prompts in question, as long as others arrive; 0 without a token."""
        since_s, since = self._prompts_end
        until_s, until = self._traffic_end
        if until <= since:
            until_s, until = self._now, self._tick
        return (until_s - since_s) / (until - since) if until > since else 0.0

    def advance(self, max_steps: int) -> int:
        """Compute up to `max_steps` coarse steps, and return their number."""
        for num_steps in range(max_steps):
            if self.is_done:
                return num_steps
            self._step()
        return max_steps

    def _step(self) -> None:
        self._add_arrivals()
        chunks = self._next_chunks() if self._may_prefill() else []
        if chunks:
            self._prefill(chunks)
        elif self._decodes:
            self._decode()
        else:
            self._now = self._next_arrival()

    def _add_arrivals(self) -> None:
        while self._num_arrived < len(self.requests) and self.requests[self._num_arrived].arrival_s <= self._now:
            if self._num_arrived not in self._first:
                self._waiting.append(self._num_arrived)
            self._num_arrived += 1

    def _next_arrival(self) -> float:
        return self.requests[self._num_arrived].arrival_s if self._num_arrived < len(self.requests) else float("inf")

    def _may_prefill(self) -> bool:
        return bool(self._waiting) and (not self._decodes or self._num_since_prefill >= self._max_consecutive_decodes)

    def _next_chunks(self) -> list[tuple[int, PromptChunk]]:
        """The chunks of the next step of prefill, first come first served."""
        left = self._most
        if self._is_mixed:
            left = min(left, self._limits.max_prefill_tokens - len(self._decodes))
        room = self._limits.max_kv_tokens
        chunks: list[tuple[int, PromptChunk]] = []
        used = self._num_context_tokens
        for number in self._waiting:
            num_prompt_tokens = self.requests[number].num_prompt_tokens
            start = self._num_computed(number)
            used += num_prompt_tokens
            is_alone = not self._decodes and not chunks
            has_slot = len(self._decodes) + len(chunks) < self._limits.max_batch_size
            if left <= 0 or not (is_alone or (has_slot and (room is None or used <= room))):
                break
            chunks.append((number, PromptChunk(start, min(left, num_prompt_tokens - start))))
            left -= chunks[-1][1].num_tokens
        return chunks

    def _num_computed(self, number: int) -> int:
        return self._computed.get(number, self.requests[number].num_computed_tokens)

    def _prefill(self, chunks: list[tuple[int, PromptChunk]]) -> None:
        num_decodes = len(self._decodes) if self._is_mixed else 0
        context = self._num_context_tokens if self._is_mixed else 0
        self._now += self._cost.step_s(StepWork([chunk for _, chunk in chunks], num_decodes, context))
        self._num_since_prefill = 0
        if num_decodes:
            self._advance_clock(1)
        for number, chunk in chunks:
            self._computed[number] = chunk.start + chunk.num_tokens
            if self._computed[number] == self.requests[number].num_prompt_tokens:
                self._waiting.popleft()
                del self._computed[number]
                self._begin(number)
                if number == len(self.requests) - 1:
                    self._traffic_end = self._now, self._tick
                if number == self._num_judged - 1:  # prompts are computed in order
                    self._prompts_end = self._now, self._tick
                    if self._given_pace_s is not None:
                        self._extrapolate(self._given_pace_s)

    def _begin(self, number: int) -> None:
        request = self.requests[number]
        self._first[number] = self._now
        if request.num_output_tokens == 1:
            self._end(number, self._now)
            return
        heapq.heappush(self._decodes, (self._tick + request.num_output_tokens - 1, number))
        self._num_context_tokens += request.num_prompt_tokens + 1

    def _decode(self) -> None:
        """Merge decode steps until a request ends or arrives, or prefill is due."""
        num = len(self._decodes)
        step_s = self._cost.step_s(StepWork((), num, self._num_context_tokens))
        num_steps = self._decodes[0][0] - self._tick
        if self._waiting:
            num_steps = min(num_steps, max(1, self._max_consecutive_decodes - self._num_since_prefill))
        else:
            num_steps = min(num_steps, 1 + int(min((self._next_arrival() - self._now) / step_s, 1e9)))
        self._now += num_steps * step_s
        self._num_since_prefill += num_steps
        self._advance_clock(num_steps)

    def _advance_clock(self, num_ticks: int) -> None:
        self._tick += num_ticks
        self._num_context_tokens += num_ticks * len(self._decodes)
        while self._decodes and self._decodes[0][0] <= self._tick:
            _, number = heapq.heappop(self._decodes)
            request = self.requests[number]
            self._num_context_tokens -= request.num_prompt_tokens + request.num_output_tokens
            self._end(number, self._now)

    def _extrapolate(self, pace_s: float) -> None:
        for tick, number in self._decodes:
            self._end(number, self._now + (tick - self._tick) * pace_s)

    def _end(self, number: int, when: float) -> None:
        self._last[number] = when
        self._num_unserved -= number < self._num_judged
