"""Queue of pending steps, and the plan of the next one."""

from collections import deque
from collections.abc import Iterator

from sageLLM.runtime.scheduler.batch import ScheduleOutput
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import DecodePlan, PendingStep, Role, StepPlan
from sageLLM.runtime.scheduler.request import Request


class StepQueue:
    """The pending steps, oldest first. Numbers the steps and counts consecutive decode steps.

    `next_plan` collects announcements (blocks, copies, cache hits) until the next step is planned.
    """

    def __init__(self) -> None:
        self.pending: deque[PendingStep] = deque()
        self.next_plan = StepPlan()
        self.num_planned = 0
        self._num_consecutive_decodes = 0

    def begin(self, role: Role | None) -> StepPlan:
        """The plan of the next step, with its context set."""
        plan, self.next_plan = self.next_plan, StepPlan()
        plan.role = role
        # A step of one worker is never ahead: its earlier step has ended or was rolled back, the other worker's step
        # computes other requests.
        plan.is_ahead = role is None and bool(self.pending)
        plan.num_consecutive_decodes = self._num_consecutive_decodes
        return plan

    def hand_out(self, plan: StepPlan, kv: KVPlacement) -> ScheduleOutput:
        """Turn a finished plan into a pending step; the blocks freed since the last step go with it."""
        if plan.prefill:
            self._num_consecutive_decodes = 0
        elif plan.decode:
            self._num_consecutive_decodes += 1
        freed, kv.freed = kv.freed, []
        freed_prefill, kv.freed_prefill = kv.freed_prefill, []
        output = plan.to_output(self.num_planned, freed, freed_prefill)
        self.num_planned += 1
        self.pending.append(PendingStep(plan, output))
        return output

    def take(self, step_id: int | None) -> PendingStep | None:
        """Remove the step with this id, or the oldest one (None if no step is pending)."""
        if step_id is None:
            return self.pending.popleft() if self.pending else None
        for step in self.pending:
            if step.step_id == step_id:
                self.pending.remove(step)
                return step
        raise ValueError(f"step_id must be that of a pending step, got {step_id}: committed or rolled back already")

    def take_newest_first(self, role: Role | None, shared: bool = False) -> Iterator[PendingStep]:
        """Remove the steps of one worker (None: all), newest first; `shared` includes the steps of all workers.

        The newest goes first because each step continues where the one before it ends.
        """
        for step in list(reversed(self.pending)):
            if role is None or step.role == role or (shared and step.role is None):
                self.pending.remove(step)
                yield step

    def restore_streak(self, step: PendingStep) -> None:
        """Count consecutive decodes as before this step, which was rolled back."""
        self._num_consecutive_decodes = step.plan.num_consecutive_decodes

    def void(self, request: Request) -> None:
        """Ignore the results that pending steps will have for this request."""
        for step in self.pending:
            step.void.add(request.request_id)

    def has_void_work(self, request: Request) -> bool:
        """Whether a pending step still computes a chunk of the request that no longer counts."""
        return any(request.request_id in step.void and step.computes(request) for step in self.pending)

    @property
    def oldest_id(self) -> int:
        """The id of the oldest pending step, or of the next step if none is pending."""
        return self.pending[0].step_id if self.pending else self.num_planned

    @property
    def decode_plans(self) -> list[DecodePlan]:
        """The decodes of the pending steps."""
        return [step.plan.decode for step in self.pending if step.plan.decode is not None]
