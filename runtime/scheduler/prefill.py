"""Plans the prefill of a step: who is admitted, and how many tokens of whose prompt are computed.

Strictly first come, first served by rank: the head gets all the tokens it can use before the next one gets any (a cap
per request would make two long prompts share the step and finish both late), and a head that does not fit is not
overtaken.
"""

from collections import deque
from collections.abc import Callable

from sageLLM.runtime.scheduler.base import Request
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.queues import WaitingLine


class PrefillPhase:
    """The line to be prefilled: `waiting` ones hold no KV yet, `started` ones hold blocks for their whole prompt.

    `can_admit` and `admit` are the scheduler's: they know blocks and seats. As a started request never asks for more
    blocks, it is not held up when the head of the waiting line does not fit, and no two prompts can block each other.
    """

    def __init__(
        self,
        waiting: WaitingLine,
        can_admit: Callable[[Request], bool],
        admit: Callable[[Request, StepPlan], None],
    ) -> None:
        self.waiting = waiting
        self.started: dict[str, Request] = {}
        self._can_admit = can_admit
        self._admit = admit

    def __len__(self) -> int:
        return len(self.waiting) + len(self.started)

    def has_work(self) -> bool:
        """Whether a step of prefill would compute anything."""
        head = self.waiting.peek()
        has_started = any(request.num_planned_tokens < request.total_tokens for request in self.started.values())
        return has_started or (head is not None and self._can_admit(head))

    def plan(self, plan: StepPlan, max_tokens: int, max_requests: int) -> None:
        """Add chunks of up to `max_tokens` tokens and `max_requests` requests to the plan.

        A step that preempts admits nobody: the blocks just freed would go to newcomers.
        """
        if not (self.started or self.waiting):
            return
        unfinished = [r for r in self.started.values() if r.num_planned_tokens < r.total_tokens]
        started = deque(sorted(unfinished, key=lambda request: request.rank))
        may_admit = not plan.preempted
        while max_tokens > 0 and len(plan.prefill) < max_requests:
            head = self.waiting.peek() if may_admit else None
            if head is not None and not (started and started[0].rank < head.rank):
                if not self._can_admit(head):
                    may_admit = False
                    continue
                self._start(head, plan)
                request = head
            elif started:
                request = started.popleft()
            else:
                break
            num_tokens = min(request.total_tokens - request.num_planned_tokens, max_tokens)
            plan.add_prefill(request, num_tokens)
            max_tokens -= num_tokens

    def _start(self, request: Request, plan: StepPlan) -> None:
        self.waiting.admit(request)
        self.started[request.request_id] = request
        self._admit(request, plan)
