"""Scheduling policies: each ranks the waiting requests; the lowest rank is admitted first and preempted last.

From its first admission on the rank of a request is constant: while it runs, is preempted, and waits again. A request
that was overtaken too often moves to the head (`WaitingQueue` in `queues.py`): the wait is bounded under every policy.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from sageLLM.runtime.scheduler.request import Rank, Request

PolicyName = Literal["fcfs", "priority", "deadline", "fair_share"]
NUM_ACCOUNTS = 1024
"""Tenants that "fair_share" remembers without a request of theirs."""


class Reranked(NamedTuple):
    """A waiting request and its new rank."""

    request: Request
    rank: Rank


class Policy(ABC):
    """Ranks requests when they arrive; a policy that accounts for service also learns when they start and end."""

    @abstractmethod
    def rank(self, request: Request) -> Rank:
        """The rank of a request that begins to wait."""

    def start(self, request: Request) -> Reranked | None:
        """A request was admitted for the first time. Returns the waiting request with a rank that changes by it."""
        return None

    def end(self, request: Request) -> Reranked | None:
        """A request ended, waiting or admitted. Returns the waiting request with a rank that changes by it."""
        return None


class FirstCome(Policy):
    """First come, first served."""

    def rank(self, request: Request) -> Rank:
        return (0, request.sequence_number)


class ByPriority(Policy):
    """Lowest `priority` first, then earliest arrival."""

    def rank(self, request: Request) -> Rank:
        return (request.priority, request.sequence_number)


class ByDeadline(Policy):
    """Earliest deadline first; requests without a deadline come last."""

    def rank(self, request: Request) -> Rank:
        return (math.inf if request.deadline is None else request.deadline, request.sequence_number)


@dataclass(slots=True)
class _Account:
    """Service of one tenant.

    `finish` is the virtual time at which its admitted requests are paid for. `waiting` holds the requests that were
    never admitted, oldest first, with the virtual time of their arrival; `charges` what the admitted ones were charged.
    """

    weight: float
    finish: float = 0.0
    waiting: dict[str, tuple[Request, float]] = field(default_factory=dict)
    charges: dict[str, float] = field(default_factory=dict)

    def start_of(self, arrival: float) -> float:
        """The start tag of a request that arrived at this virtual time, if it is the next one of the tenant."""
        return max(arrival, self.finish)

    def head(self) -> Reranked | None:
        """The longest-waiting request, with its start tag."""
        if not self.waiting:
            return None
        request, arrival = next(iter(self.waiting.values()))
        return Reranked(request, (self.start_of(arrival), request.sequence_number))


class FairShare(Policy):
    """Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over tenants.

    A tenant with many requests does not delay those of the others. The start tag of a request is the finish tag of its
    tenant's previous one, or the virtual time of its arrival if that is later: an idle tenant accumulates no credit.
    Its finish tag is the start tag plus its tokens divided by the tenant's weight (default 1). The virtual time is the
    start tag of the last admission.

    On admission a request is charged its prompt and `max_new_tokens`; at its end the tokens that it did not generate
    are refunded, and the start tags after it move forward. Therefore only the longest-waiting request of a tenant has a
    start tag; those after it rank last until it is admitted.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights = dict(weights or {})
        for tenant, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of tenant {tenant!r} must be a positive number, got {weight}")
        self._accounts: dict[str, _Account] = {}
        self._max_accounts = NUM_ACCOUNTS
        self._live: set[str] = set()
        self._virtual_time = 0.0

    def rank(self, request: Request) -> Rank:
        self._live.add(request.request_id)
        account = self._accounts.get(request.tenant)
        if account is None:
            self._forget_tenants()
            account = self._accounts[request.tenant] = _Account(self.weights.get(request.tenant, 1.0))
        is_next = not account.waiting
        account.waiting[request.request_id] = (request, self._virtual_time)
        start = account.start_of(self._virtual_time) if is_next else math.inf
        return (start, request.sequence_number)

    def start(self, request: Request) -> Reranked | None:
        account = self._accounts[request.tenant]
        _, arrival = account.waiting.pop(request.request_id)
        start = account.start_of(arrival)
        if start > account.finish:  # the tenant was idle, and what it owed or was owed is settled
            account.charges.clear()
        charge = (request.num_prompt_tokens + request.max_new_tokens) / account.weight
        account.charges[request.request_id] = charge
        account.finish = start + charge
        is_in_order = request.rank == (start, request.sequence_number) and request.fork_of is None
        # A promoted request and a fork start before requests with earlier start tags. The virtual time does not pass
        # those: a tenant that arrives now would wait until all others have caught up.
        self._virtual_time = start if is_in_order else min(start, self._first_start())
        if request.rank[0] == math.inf:  # a fork that started before older requests of its tenant
            request.rank = (start, request.sequence_number)
        return account.head()

    def end(self, request: Request) -> Reranked | None:
        self._live.discard(request.request_id)
        account = self._accounts.get(request.tenant)
        if account is None:
            return None
        account.waiting.pop(request.request_id, None)
        charge = account.charges.pop(request.request_id, None)
        if charge is not None:
            account.finish -= charge - request.total_tokens / account.weight
        if not self._live:  # the next request finds all tenants idle, so they begin as equals
            self._accounts.clear()
        return account.head()

    def _first_start(self) -> float:
        heads = (account.head() for account in self._accounts.values())
        return min((head.rank[0] for head in heads if head is not None), default=math.inf)

    def _forget_tenants(self) -> None:
        """Bound the number of accounts without requests; those that owe least go first, and then rank like new ones."""
        if len(self._accounts) < self._max_accounts:
            return
        quiet = [tenant for tenant, one in self._accounts.items() if not (one.waiting or one.charges)]
        quiet.sort(key=lambda tenant: self._accounts[tenant].finish)
        for tenant in quiet[: -NUM_ACCOUNTS // 2]:
            del self._accounts[tenant]
        self._max_accounts = max(NUM_ACCOUNTS, 2 * len(self._accounts))


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
