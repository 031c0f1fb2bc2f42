"""Preemption: finds blocks for growing decodes, by taking those of the running request with the last rank."""

from collections.abc import Collection

from sageLLM.runtime.scheduler.lifecycle import Lifecycle
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.state import SchedulerState


class Preemption:
    """Grows decodes block by block.

    The victim is always the running request with the last rank, so the running request with the first rank is never a
    victim and there is always progress.
    """

    def __init__(self, state: SchedulerState, lifecycle: Lifecycle) -> None:
        self._config = state.config
        self._kv = state.kv
        self._table = state.table
        self._steps = state.steps
        self._migration = state.migration
        self._swaps = state.swaps
        self._counters = state.counters
        self._lifecycle = lifecycle

    def grow(self, request: Request, step: StepPlan) -> bool:
        """Allocate the block of a decode's next token, preempting if necessary; False if this step must skip it.

        It is skipped, with its blocks, if a copy in flight will free a block anyway, or if the only victim with a
        lower rank is pinned.
        """
        num_tokens = request.num_planned_tokens + 1
        while not self._kv.can_extend(request, num_tokens):
            # Copies to a tier free their blocks when they end; one such block per waiting decode saves a preemption.
            if self._kv.decode.num_pending_free_blocks > step.num_awaiting_blocks:
                step.num_awaiting_blocks += 1
                return False
            pinned = self._pinned()
            victim = self._victim(pinned)
            assert self._config.enable_preemption, "a request outgrew its reservation"
            if victim is None or (victim is request and pinned):
                return False  # a pinned request will soon decode, and can be preempted instead
            self._preempt(victim, step)
            if victim is request:
                return False
        step.add_blocks(request, self._kv.extend(request, num_tokens))
        return True

    def _victim(self, pinned: Collection[str]) -> Request | None:
        candidates = (r for r in self._table.running.values() if r.request_id not in pinned)
        return max(candidates, key=lambda request: request.rank, default=None)

    def _pinned(self) -> Collection[str]:
        """Requests that cannot be preempted: their KV is being copied, or computed in a step of the prefill worker.

        A copy reads and writes the blocks at an unknown time, and a prefill worker that steps at its own pace is not
        synchronised with the decode worker's step in which the blocks would be reused.
        """
        prefills = [c.request.request_id for s in self._steps.pending if s.role == "prefill" for c in s.prefill_chunks]
        return {*prefills, *self._migration.copying, *self._swaps.copying, *self._table.reserved}

    def _preempt(self, request: Request, step: StepPlan) -> None:
        step.preempted.append(request)
        if not self._swap_out(request, step):
            step.add_blocks(request, self._lifecycle.requeue(request, unannounced=step.drop(request)))

    def _swap_out(self, request: Request, step: StepPlan) -> bool:
        """Keep a decoding victim's KV in a tier, including tokens of pending steps: they run before the copy."""
        if self._config.preemption_mode != "swap" or request.status is not RequestStatus.DECODING:
            return False
        num_tokens = request.num_planned_tokens
        if not self._swaps.begin_out(request, step, num_tokens):
            return False
        if num_tokens > request.num_computed_tokens:
            newest = next(step for step in reversed(self._steps.pending) if step.computes(request))
            newest.swapped[request.request_id] = request
        self._lifecycle.suspend(request)
        request.kv_block_ids = []
        self._counters.total_swaps += 1
        return True
