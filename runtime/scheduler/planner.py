"""Planning of the steps of the PD scheduler: what a step has, and what the requests of pending steps do in it."""

from collections.abc import Collection, Sequence

from sageLLM.runtime.scheduler.admission import Admission
from sageLLM.runtime.scheduler.batch import ScheduleOutput
from sageLLM.runtime.scheduler.lifecycle import Lifecycle
from sageLLM.runtime.scheduler.modes import Mode
from sageLLM.runtime.scheduler.plan import PendingStep, Role
from sageLLM.runtime.scheduler.state import SchedulerState


class StepPlanner:
    """Plans steps by a mode. `role` is that of a worker in a group of workers with a scheduler each."""

    def __init__(
        self, state: SchedulerState, lifecycle: Lifecycle, admission: Admission, mode: Mode, num_stages: int
    ) -> None:
        self.mode = mode
        self.role: Role | None = None
        self._state, self._lifecycle, self._admission = state, lifecycle, admission
        self._kv, self._table, self._steps = state.kv, state.table, state.steps
        self._num_stages = num_stages

    def plan(self, role: Role | None) -> ScheduleOutput:
        """The next step, in strict mode of one of the two workers, or of both if `role` is None."""
        step = self._steps.begin(role)
        if step.new_blocks:
            step.cancel_unheard(self._table.running, self._kv.freed)
        if role != "prefill":
            self._admission.admit_ready(step)
        self.mode.fill(step)
        if self._kv.is_split and role != "decode":
            self._state.migration.add_to(step)
        output = self._steps.hand_out(step, self._kv)
        self._state.counters.count_plan(output)
        return output

    def decode_ahead(self) -> None:
        """Let the requests with their last chunk in a pending step decode in the next one."""
        steps = list(self._steps.pending)
        if len(steps) > self._num_stages:
            raise RuntimeError(
                f"at most {self._num_stages} steps can be pending, got {len(steps)}; commit one with update_after_step"
            )
        if self._kv.is_split or self.role is not None:
            return  # the KV must migrate before the first decode
        for i, step in enumerate(steps[: len(steps) - self._num_stages + 1]):
            self._start_decodes(step, steps[i + 1 :])

    def _start_decodes(self, step: PendingStep, later: Sequence[PendingStep]) -> None:
        for chunk in step.prefill_chunks:
            request = chunk.request
            is_live = request.request_id in self._table.running and request.slot is None
            if chunk.is_last and is_live and self._state.limits.num_decodes_left(request) > 1:
                self._lifecycle.start_decoding_ahead(request, later)

    def may_idle(self, role: Role | None) -> bool:
        """Whether an empty step is legitimate: nothing to do, or the work depends on a copy or a pending step."""
        is_copying = bool(self._state.migration.copying or self._state.swaps.copying or self._table.pending_free)
        if is_copying or any(not step.output.is_empty for step in self._steps.pending):
            return True  # their end will free blocks or make a request ready
        if self.role is not None:  # blocks of others may be in the way, and preempted requests may wait to be withdrawn
            return True
        if not (self._table.running or self._table.waiting):
            return True
        if role == "decode":
            return not self._state.decodes.requests
        head = self._table.waiting.peek()
        can_start = head is not None and self._admission.needs_no_prefill(head)
        return role == "prefill" and (bool(self._state.decodes.requests) or can_start)

    def promote_kv(self, step: ScheduleOutput, limit: int) -> Collection[str]:
        """Moves up to `limit` KV blocks of the step's decodes to the device; returns the requests with other blocks."""
        has_copies = step.block_copies or step.tier_copies or step.kv_migrations
        if step.decode_batch is None or has_copies:
            return ()
        names = [request.request_id for request in step.decode_batch.requests]
        moved = self._kv.decode.promote(names, limit, step.step_id)
        for request_id, copies in moved.items():
            step.kv_blocks_to_allocate.setdefault(request_id, []).extend(copy.target for copy in copies)
            step.block_copies += copies
        return moved.keys()
