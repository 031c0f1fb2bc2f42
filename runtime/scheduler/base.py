"""Scheduler interface, and the types that it shares with the engine, the KV runtime and the metrics.

One step is: `out = scheduler.schedule()`; the engine runs the batches and copies of `out` and appends one sampled
token to each request with an `is_last` chunk; `scheduler.update_after_step(finished_ids)` commits the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

from sageLLM.runtime.errors import SchedulerStalledError
from sageLLM.runtime.scheduler.batch import Batch, Chunk, KVBudget, KVMigration, ScheduleOutput, Stage
from sageLLM.runtime.scheduler.policy import ByPriority, Policy
from sageLLM.runtime.scheduler.queues import WaitingQueue
from sageLLM.runtime.scheduler.request import Rank, Request, RequestStatus

__all__ = [
    "BaseScheduler",
    "Batch",
    "Chunk",
    "KVBudget",
    "KVMigration",
    "Rank",
    "Request",
    "RequestStatus",
    "ScheduleOutput",
    "SchedulerStalledError",
    "Stage",
]


class BaseScheduler(ABC):
    """Scheduler of at most `max_batch_size` running requests and `max_tokens` tokens per step.

    `waiting_queue` holds the requests without KV (new or preempted) by rank, `running_requests` those with KV by id,
    and `preempted_requests` the waiting ones that lost their KV, by id. `policy` ranks requests.
    """

    def __init__(
        self, max_batch_size: int = 256, max_tokens: int = 8192, policy: Policy | None = None, max_overtakes: int = 256
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_tokens = max_tokens
        self.policy: Policy = ByPriority() if policy is None else policy
        self.waiting_queue = WaitingQueue(max_overtakes)
        self.running_requests: dict[str, Request] = {}
        self.preempted_requests: dict[str, Request] = {}
        self._num_arrivals = 0

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an empty, used or duplicate one, and for one that can never run."""
        reason = self.why_not_acceptable(request)
        if reason is not None:
            raise ValueError(reason)
        self._number(request)
        self._enqueue(request)

    def _number(self, request: Request) -> None:
        """Number an arrival."""
        request.sequence_number = self._num_arrivals
        self._num_arrivals += 1

    def _enqueue(self, request: Request) -> None:
        """Let an accepted request wait."""
        request.rank = self.policy.rank(request)
        self.waiting_queue.push(request)

    def why_not_acceptable(self, request: Request) -> str | None:
        """The reason why `add_request` would refuse the request, or None."""
        request_id = request.request_id
        if request_id in self.waiting_queue or request_id in self.running_requests:
            return f"request {request_id!r} is already being served; ids of live requests must differ"
        if not request.prompt_token_ids:
            return f"request {request_id!r} has an empty prompt; it needs at least one token"
        if request.max_new_tokens < 1:
            return f"request {request_id!r} asks for max_new_tokens={request.max_new_tokens}; it must be at least 1"
        if request.status is not RequestStatus.WAITING:
            return f"request {request_id!r} is {request.status.value}; make a new Request to run it again"
        return None

    @abstractmethod
    def abort_request(self, request_id: str) -> bool:
        """End a request in any state; False when no live request has this id."""

    @abstractmethod
    def schedule(self) -> ScheduleOutput:
        """Plan the next step. Nothing counts as computed until `update_after_step`."""

    @abstractmethod
    def update_after_step(
        self, finished_request_ids: Iterable[str], pending_migrations: Collection[str] = ()
    ) -> list[str]:
        """Commit the planned step, end the finished requests, and return the ids that the scheduler itself ended."""

    def get_num_waiting(self) -> int:
        """Number of requests without KV, new and preempted."""
        return len(self.waiting_queue)

    def get_num_running(self) -> int:
        """Number of requests with KV."""
        return len(self.running_requests)
