"""Plans the decodes of a step: one token for each request, in turns when there are more requests than seats."""

from collections.abc import Callable

from sageLLM.runtime.scheduler.base import Chunk, Request, RequestStatus
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.queues import TurnQueue


class DecodePhase:
    """The line of requests whose prompt is computed and whose KV is on the decode worker.

    `grow` is the scheduler's: it gives a request the block for its next token, preempting if it must, and says whether
    the request still runs in this step.
    """

    def __init__(self, block_size: int, grow: Callable[[Request, StepPlan], bool]) -> None:
        self.queue: TurnQueue[Request] = TurnQueue()
        self._block_size = block_size
        self._grow = grow

    def plan(self, plan: StepPlan, max_requests: int) -> None:
        """Add up to `max_requests` decodes to the plan, those that waited longest first."""
        for request in list(self.queue):
            if len(plan.decode) >= max_requests:
                break
            if request.status is not RequestStatus.DECODING:  # preempted a moment ago, for one served before
                continue
            has_room = request.num_computed_tokens < len(request.kv_block_ids) * self._block_size
            if has_room or self._grow(request, plan):
                plan.add_decode(request)

    def end_turn(self, served: list[Chunk]) -> None:
        """After a step that could not serve all, those who were served let the others go first."""
        if len(served) >= len(self.queue):
            return
        for chunk in served:
            if chunk.request in self.queue:
                self.queue.to_back(chunk.request)
