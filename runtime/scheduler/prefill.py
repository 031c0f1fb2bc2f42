"""Prefill phase of a step: admits requests, and adds chunks of their prompts.

First come, first served by rank: the first request gets all the tokens it can use before the next one gets any. A cap
per request would make two long prompts share the step and finish both late.
"""

from collections import deque

from sageLLM.runtime.scheduler.admission import Admission
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.table import RequestTable


class PrefillPhase:
    """Adds prefill chunks to a step.

    A started request holds blocks for its whole prompt. It never needs more, so it is not held up when the head of the
    waiting queue does not fit, and no two prompts can block each other.
    """

    def __init__(self, table: RequestTable, admission: Admission) -> None:
        self._table = table
        self._admission = admission

    def has_work(self) -> bool:
        """Whether a prefill step would compute anything."""
        prefilling = self._table.prefilling
        if prefilling and any(request.num_planned_tokens < request.total_tokens for request in prefilling.values()):
            return True
        head = self._table.waiting.peek()
        return head is not None and self._admission.can_admit(head)

    def add_to(self, step: StepPlan, max_tokens: int, max_requests: int) -> None:
        """Add chunks of up to `max_tokens` tokens and `max_requests` requests.

        A step that preempts admits nothing: new requests would take the blocks just freed, and the decodes that needed
        them would preempt again.
        """
        table = self._table
        if not (table.prefilling or table.waiting):
            return
        started: deque[Request] = deque()
        if table.prefilling:
            unfinished = [r for r in table.prefilling.values() if r.num_planned_tokens < r.total_tokens]
            started.extend(sorted(unfinished, key=lambda request: request.rank))
        may_admit = not step.preempted
        while max_tokens > 0 and len(step.prefill) < max_requests:
            # By rank across both: a started request of lower rank must not hold up a new one of higher rank.
            head = table.waiting.peek() if may_admit else None
            if head is not None and not (started and started[0].rank < head.rank):
                if not self._admission.can_admit(head):
                    may_admit = False  # the requests after it are not tried: they would overtake it again and again
                    continue
                self._admission.admit(head, step)
                request = head
            elif started:
                request = started.popleft()
            else:
                break
            num_tokens = min(request.total_tokens - request.num_planned_tokens, max_tokens)
            step.add_prefill(request, num_tokens)
            max_tokens -= num_tokens
