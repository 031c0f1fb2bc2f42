"""Commit of executed steps: counts their tokens as computed, and moves requests to their next phase."""

from collections.abc import Iterable

from sageLLM.runtime.scheduler.batch import Chunk
from sageLLM.runtime.scheduler.lifecycle import Lifecycle
from sageLLM.runtime.scheduler.plan import PendingStep
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.state import SchedulerState


class StepCommit:
    """Commits steps that the engine has executed."""

    def __init__(self, state: SchedulerState, lifecycle: Lifecycle) -> None:
        self._clock = state.clock
        self._max_batch_size = state.max_batch_size
        self._limits = state.limits
        self._kv = state.kv
        self._table = state.table
        self._steps = state.steps
        self._decodes = state.decodes
        self._migration = state.migration
        self._swaps = state.swaps
        self._lifecycle = lifecycle

    def commit(self, step: PendingStep) -> list[Request]:
        """Commit a step; returns the requests that are complete."""
        candidates: list[Request] = []
        if step.plan.decode is not None:
            candidates = self._decodes.commit(step.plan.decode)
        # The copy to the tier runs after this step and includes its token.
        for request in step.swapped.values():
            if request.status is RequestStatus.PREEMPTED:
                request.compute_up_to(request.num_computed_tokens + 1)
        if step.output.prefill_batch is not None:
            now = self._clock()
            chunks = step.output.prefill_batch.chunks
            for chunk in chunks:
                self._commit_prefill(chunk, now, is_void=chunk.request.request_id in step.void)
            # A request can be complete with its first token.
            candidates = [*(chunk.request for chunk in chunks if chunk.is_last), *candidates]
        if step.output.tier_copies:
            self._swaps.commit(step.output.tier_copies)
        if self._limits.switch_len is not None:
            self._table.outgrown |= {request.request_id: request for request in candidates}
        return [request for request in candidates if self._limits.is_complete(request)] if candidates else []

    def commit_prefills(self, step: PendingStep, request_ids: Iterable[str]) -> None:
        """Commit the last chunks of these requests before the rest of the step."""
        last = {chunk.request.request_id: chunk for chunk in step.prefill_chunks if chunk.is_last}
        for request_id in request_ids:
            if request_id in last and request_id not in step.void:
                self._commit_prefill(last[request_id], self._clock())
                step.void.add(request_id)

    def _commit_prefill(self, chunk: Chunk, now: float, is_void: bool = False) -> None:
        request = chunk.request
        if request.status is RequestStatus.FINISHED:
            return
        if chunk.is_last and request.first_token_time is None:
            request.first_token_time = now
        if is_void:  # the token counts (the engine has appended it), the KV does not
            return
        end = chunk.start + chunk.num_tokens
        request.compute_up_to(end)
        # Not earlier: before the commit a preemption or a failed step could leave the shared blocks uncomputed.
        self._kv.publish(request)
        if chunk.is_last:
            self._start_forks(request, now)
        if self._kv.is_split:
            self._migration.note_computed(request, chunk.is_last)
        if not chunk.is_last:
            return
        if request.slot is not None:  # a decode was planned ahead
            self._decodes.commit_prefill(request.slot, end)
            request.status = RequestStatus.DECODING
            return
        del self._table.prefilling[request.request_id]
        if not self._kv.is_split:
            self._lifecycle.start_decoding(request)

    def _start_forks(self, parent: Request, now: float) -> None:
        """Share the parent's computed prompt with its forks."""
        for fork in self._table.forks.take(parent.request_id):
            shared = None
            if fork.output_token_ids and len(self._table.running) < self._max_batch_size:
                shared = self._kv.fork(parent, fork, self._limits.num_tokens_reserved(fork))
            if shared is None:
                self._lifecycle.queue_fork(fork)
                continue
            self._lifecycle.rank_fork(fork)
            fork.first_token_time = now
            fork.compute_up_to(parent.num_computed_tokens)
            fork.plan_up_to(parent.num_computed_tokens)
            self._lifecycle.run(fork)
            new_blocks, copies = shared
            self._steps.next_plan.add_blocks(fork, new_blocks)
            self._steps.next_plan.block_copies[fork.request_id] = copies
            self._lifecycle.start_decoding(fork)
