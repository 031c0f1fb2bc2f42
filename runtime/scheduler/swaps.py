"""Swaps of preempted requests between the device and the KV tiers (host memory, disk)."""

from collections.abc import Iterable

from sageLLM.runtime.kv.copies import TierCopy
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.steps import StepQueue


class Swaps:
    """Requests with a copy between tiers that is handed out, or about to be, and not committed."""

    def __init__(self, kv: KVPlacement, steps: StepQueue) -> None:
        self.copying: dict[str, None] = {}  # used as an ordered set
        self._kv = kv
        self._steps = steps

    def begin_out(self, request: Request, step: StepPlan, num_tokens: int) -> bool:
        """Copy the first `num_tokens` tokens of a decoding request to a tier; False when every tier is full."""
        copy = self._kv.swap_out(request, num_tokens)
        if copy is not None:
            self._begin(copy, step)
        return copy is not None

    def begin_in(self, request: Request, step: StepPlan, num_tokens: int) -> None:
        """Copy a request back to the device, into a table for `num_tokens` tokens."""
        copy, table = self._kv.swap_in(request, num_tokens)
        step.add_blocks(request, table)
        self._begin(copy, step)

    def _begin(self, copy: TierCopy, step: StepPlan) -> None:
        step.tier_copies[copy.seq_id] = copy
        self.copying[copy.seq_id] = None

    def commit(self, copies: Iterable[TierCopy]) -> None:
        """The copies of a committed step are done."""
        for copy in copies:
            self._kv.finish_swap(copy.seq_id)
            self.copying.pop(copy.seq_id, None)

    def drop(self, request_id: str) -> None:
        """Undo a copy that failed or was not begun."""
        self.copying.pop(request_id, None)
        next_plan = self._steps.next_plan
        next_plan.tier_copies.pop(request_id, None)
        freed = self._kv.abort_swap(request_id)
        if freed:
            unheard = next_plan.new_blocks.pop(request_id, [])
            self._kv.freed += [block for block in freed if block not in unheard]
