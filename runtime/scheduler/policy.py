"""Scheduling policies: each ranks a request on arrival; the lowest rank is admitted first and preempted last.

A rank is constant while a request waits, runs, is preempted and waits again. Only a request that was overtaken too
often moves to the head (`WaitingQueue` in `queues.py`), which bounds the wait under every policy.
"""

import math
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

from sageLLM.runtime.scheduler.request import Rank, Request

PolicyName = Literal["fcfs", "priority", "deadline", "fair_share"]


class Policy(Protocol):
    """Ranks arriving requests. `head` is the head of the waiting queue, None if the queue is empty."""

    def rank(self, request: Request, head: Request | None) -> Rank: ...


class FirstCome:
    """First come, first served."""

    def rank(self, request: Request, head: Request | None) -> Rank:
        return (0, request.sequence_number)


class ByPriority:
    """Lowest `priority` first, then earliest arrival."""

    def rank(self, request: Request, head: Request | None) -> Rank:
        return (request.priority, request.sequence_number)


class ByDeadline:
    """Earliest deadline first; requests without a deadline come last."""

    def rank(self, request: Request, head: Request | None) -> Rank:
        return (math.inf if request.deadline is None else request.deadline, request.sequence_number)


class FairShare:
    """Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over tenants.

    A tenant with many requests does not delay those of the others: each tenant's requests are spread over a virtual
    time that advances by their tokens (prompt and `max_new_tokens`) divided by the tenant's weight (default 1). A
    tenant that was idle starts at the current virtual time; it accumulates no credit.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights = dict(weights or {})
        for tenant, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of tenant {tenant!r} must be a positive number, got {weight}")
        self._finish: dict[str, float] = {}
        self._latest_start = 0.0

    def rank(self, request: Request, head: Request | None) -> Rank:
        now = self._latest_start if head is None else max(0.0, head.rank[0])
        start = max(now, self._finish.get(request.tenant, 0.0))
        cost = request.num_prompt_tokens + request.max_new_tokens
        self._finish[request.tenant] = start + cost / self.weights.get(request.tenant, 1.0)
        self._latest_start = max(self._latest_start, start)
        self._drop_idle_tenants(now)
        return (start, request.sequence_number)

    def _drop_idle_tenants(self, now: float) -> None:
        # A tenant with its last request over in virtual time ranks like a new one; dropping it bounds the table.
        if len(self._finish) > 1024:
            self._finish = {tenant: finish for tenant, finish in self._finish.items() if finish > now}


def make_policy(name: PolicyName, tenant_weights: Mapping[str, float] | None = None) -> Policy:
    """Returns the policy of this name; `tenant_weights` are those of "fair_share"."""
    match name:
        case "fcfs":
            return FirstCome()
        case "priority":
            return ByPriority()
        case "deadline":
            return ByDeadline()
        case "fair_share":
            return FairShare(tenant_weights)
    raise ValueError(f"policy must be one of {', '.join(get_args(PolicyName))}; got {name!r}")
