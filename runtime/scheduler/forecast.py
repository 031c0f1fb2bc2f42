"""Forecasts the service that requests would get under a rule for mixing prefill and decode, in coarse steps.

It is a sketch of the scheduler that is fast enough to be run while serving: no blocks and no preemption, and a run of
equal decode steps is one. It ranks rules; for figures there is the simulator (`runtime/sim`).
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
    """What a request is promised, in seconds: its first token, and the mean time per token after it."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What bounds a worker: prompt tokens of a step, decode steps between two of prefill, requests, tokens of KV."""

    max_prefill_tokens: int
    max_consecutive_decodes: int
    max_batch_size: int
    max_kv_tokens: int | None = None


class ExpectedRequest(NamedTuple):
    """A request as far as it is known: arrival in seconds, tokens of its prompt, tokens that its answer may have."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int


class Served(NamedTuple):
    """When a request got its first and its last token."""

    first_s: float
    last_s: float


class Forecast:
    """One run of requests, in order of arrival, under a rule, on a worker that starts idle.

    Decodes join at a tick of the decode clock and end at another, so that a tick touches nobody.
    """

    def __init__(
        self, rule: ModeChoice, requests: Sequence[ExpectedRequest], cost: StepCostModel, limits: ServiceLimits
    ) -> None:
        self.rule = rule
        self.requests = requests
        self._cost = cost
        self._limits = limits
        self._is_mixed = rule.mode == "hybrid"
        self._most = min(rule.max_prefill_tokens or limits.max_prefill_tokens, limits.max_prefill_tokens)
        self._patience = limits.max_consecutive_decodes if rule.mode == "time_share" else 0
        self._now = 0.0
        self._tick = 0
        self._num_since_prefill = 0
        self._num_context_tokens = 0
        self._num_arrived = 0
        self._waiting: deque[int] = deque()
        self._start = 0  # tokens of the head of the line that are computed
        self._decodes: list[tuple[int, int]] = []
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}

    @property
    def is_done(self) -> bool:
        """Whether everybody is served."""
        return len(self._last) == len(self.requests)

    @property
    def served(self) -> list[Served]:
        """The service of each request; all of them once the forecast is done."""
        return [Served(self._first[i], self._last[i]) for i in range(len(self.requests)) if i in self._last]

    def advance(self, max_steps: int) -> None:
        """Up to so many coarse steps."""
        for _ in range(max_steps):
            if self.is_done:
                return
            self._step()

    def _step(self) -> None:
        self._let_arrive()
        chunks = self._next_chunks() if self._may_prefill() else []
        if chunks:
            self._prefill(chunks)
        elif self._decodes:
            self._decode()
        else:
            self._now = self._next_arrival()

    def _let_arrive(self) -> None:
        while self._num_arrived < len(self.requests) and self.requests[self._num_arrived].arrival_s <= self._now:
            self._waiting.append(self._num_arrived)
            self._num_arrived += 1

    def _next_arrival(self) -> float:
        return self.requests[self._num_arrived].arrival_s if self._num_arrived < len(self.requests) else float("inf")

    def _may_prefill(self) -> bool:
        return bool(self._waiting) and (not self._decodes or self._num_since_prefill >= self._patience)

    def _next_chunks(self) -> list[tuple[int, PromptChunk]]:
        """The chunks of the next step of prefill, first come first served."""
        left = self._most
        if self._is_mixed:
            left = min(left, self._limits.max_prefill_tokens - len(self._decodes))
        room = self._limits.max_kv_tokens
        chunks: list[tuple[int, PromptChunk]] = []
        start, used = self._start, self._num_context_tokens
        for number in self._waiting:
            num_prompt_tokens = self.requests[number].num_prompt_tokens
            used += num_prompt_tokens
            is_alone = not self._decodes and not chunks
            has_seat = len(self._decodes) + len(chunks) < self._limits.max_batch_size
            if left <= 0 or not (is_alone or (has_seat and (room is None or used <= room))):
                break
            chunks.append((number, PromptChunk(start, min(left, num_prompt_tokens - start))))
            left -= chunks[-1][1].num_tokens
            start = 0
        return chunks

    def _prefill(self, chunks: list[tuple[int, PromptChunk]]) -> None:
        num_decodes = len(self._decodes) if self._is_mixed else 0
        context = self._num_context_tokens if self._is_mixed else 0
        self._now += self._cost.step_s(StepWork([chunk for _, chunk in chunks], num_decodes, context))
        self._num_since_prefill = 0
        if num_decodes:
            self._tick_on(1)
        for number, chunk in chunks:
            self._start = chunk.start + chunk.num_tokens
            if self._start == self.requests[number].num_prompt_tokens:
                self._waiting.popleft()
                self._start = 0
                self._begin(number)

    def _begin(self, number: int) -> None:
        request = self.requests[number]
        self._first[number] = self._now
        if request.num_output_tokens == 1:
            self._last[number] = self._now
            return
        heapq.heappush(self._decodes, (self._tick + request.num_output_tokens - 1, number))
        self._num_context_tokens += request.num_prompt_tokens + 1

    def _decode(self) -> None:
        """As many steps as nothing changes in: until one ends, somebody arrives, or prefill is due."""
        num = len(self._decodes)
        step_s = self._cost.step_s(StepWork((), num, self._num_context_tokens))
        num_steps = self._decodes[0][0] - self._tick
        if self._waiting:
            num_steps = min(num_steps, max(1, self._patience - self._num_since_prefill))
        else:
            num_steps = min(num_steps, 1 + int(min((self._next_arrival() - self._now) / step_s, 1e9)))
        self._now += num_steps * step_s
        self._num_since_prefill += num_steps
        self._tick_on(num_steps)

    def _tick_on(self, num_ticks: int) -> None:
        self._tick += num_ticks
        self._num_context_tokens += num_ticks * len(self._decodes)
        while self._decodes and self._decodes[0][0] <= self._tick:
            _, number = heapq.heappop(self._decodes)
            request = self.requests[number]
            self._num_context_tokens -= request.num_prompt_tokens + request.num_output_tokens
            self._last[number] = self._now
