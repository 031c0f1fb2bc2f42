"""Decode phase of a step: one token for each decoding request, round robin when a step cannot serve all."""

from sageLLM.runtime.scheduler.decode_queue import DecodeQueue
from sageLLM.runtime.scheduler.micro_batches import MicroBatches
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.preemption import Preemption
from sageLLM.runtime.scheduler.request import DecodeSlot, Request


class DecodePhase:
    """Adds decodes to a step, with the blocks that they need."""

    def __init__(
        self,
        queue: DecodeQueue,
        kv: KVPlacement,
        preemption: Preemption,
        micro_batches: MicroBatches,
        max_context_tokens: int | None = None,
    ) -> None:
        self._queue = queue
        self._kv = kv
        self._preemption = preemption
        self._micro_batches = micro_batches
        self._max_context_tokens = max_context_tokens

    @property
    def num_requests(self) -> int:
        """The number of requests that decode."""
        return len(self._queue.requests)

    def has_work(self) -> bool:
        """Whether any request decodes."""
        return len(self._queue.requests) > 0

    def add_to(self, step: StepPlan, max_requests: int) -> None:
        """Add up to `max_requests` decodes, those that waited longest first.

        In a step planned ahead, requests with their last token in the pending step are skipped.
        """
        queue = self._queue
        num_requests = len(queue.requests)
        if num_requests == 0:
            return
        if self._micro_batches.num_stages > 1:
            max_requests = min(max_requests, self._micro_batches.max_requests(num_requests))
            self._add_round_robin(step, max_requests, self._micro_batches.skipped())
            return
        skipped = queue.ending() if step.is_ahead else {}
        if num_requests > max_requests or self._max_context_tokens is not None:
            self._add_round_robin(step, max_requests, skipped)
            return
        full = queue.pop_full(skipped)
        if full and not self._grow_together(full, step):
            self._grow_one_by_one(full, step, skipped)
        if step.preempted:  # a victim has left the queue, and its slot with it
            skipped = {request_id: slot for request_id, slot in skipped.items() if slot.is_live}
        step.decode = queue.advance(skipped)

    def _grow_together(self, full: list[DecodeSlot], step: StepPlan) -> bool:
        """The common case: enough blocks are free for all. False, and no change, if not."""
        blocks = self._kv.take_each(len(full))
        if blocks is None:
            return False
        self._queue.grow(full, blocks, step.new_blocks)
        return True

    def _grow_one_by_one(self, full: list[DecodeSlot], step: StepPlan, skipped: dict[str, DecodeSlot]) -> None:
        """Allocate a block for each full slot, preempting; those that get none are added to `skipped`."""
        for slot in full:
            request = slot.request
            if not slot.is_live:  # preempted for an earlier slot of this loop
                continue
            if self._preemption.grow(request, step):
                self._queue.note_growth(slot)
            elif slot.is_live:
                skipped[request.request_id] = slot

    def _add_round_robin(self, step: StepPlan, max_requests: int, skipped: dict[str, DecodeSlot]) -> None:
        """Serve the first `max_requests` requests of the queue that can run; they move to its back."""
        queue = self._queue
        served = self._choose(step, max_requests, skipped)
        skipped = {r.request_id: r.slot for r in queue.requests if r.slot is not None and r.request_id not in served}
        due = queue.pop_due()
        step.decode = queue.advance_round(list(served.values()), skipped)
        for slot in due:
            # Entering only live slots that `advance` has not entered keeps the calendar from filling up with
            # duplicates, which would multiply with every round.
            if slot.is_live and slot.growth_tick < queue.clock.planned:
                queue.note_growth(slot)

    def _choose(self, step: StepPlan, max_requests: int, skipped: dict[str, DecodeSlot]) -> dict[str, Request]:
        """The requests to serve, within the bounds on requests and context tokens; allocates their blocks."""
        served: dict[str, Request] = {}
        context_left = self._max_context_tokens
        for request in list(self._queue.requests):
            if len(served) >= max_requests:
                break
            slot = request.slot
            if slot is None or request.request_id in skipped:  # None: preempted for an earlier one of this loop
                continue
            if context_left is not None:
                context_left -= request.num_planned_tokens + 1
                if context_left < 0 and served:
                    break
            if self._queue.has_room(slot) or self._preemption.grow(request, step):
                served[request.request_id] = request
            if step.preempted:  # a request chosen earlier in this loop may be a victim now
                served = {request_id: r for request_id, r in served.items() if r.slot is not None}
        return served
