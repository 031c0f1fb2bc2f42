"""A simulated worker: the engine's scheduler with a cost model in place of a device."""

from collections.abc import Callable
from dataclasses import dataclass

from sageLLM.runtime.scheduler.base import BaseScheduler
from sageLLM.runtime.scheduler.batch import Batch, DecodeStepBatch, KVMigration, ScheduleOutput
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepCostModel, StepWork
from sageLLM.runtime.sim.baselines.running_first import RunningFirstScheduler
from sageLLM.runtime.sim.metrics import Timeline
from sageLLM.runtime.sim.pipeline import Stages


class VirtualClock:
    """Simulated time in seconds, advanced by the event queue."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


MakeScheduler = Callable[[VirtualClock], BaseScheduler]


@dataclass(slots=True)
class LiveRequest:
    """A request on a worker, which it leaves after `num_left` more tokens."""

    timeline: Timeline
    request: Request
    num_left: int
    last_token_s: float


class Worker:
    """Runs the steps that its scheduler plans. All tokens are 0, as the trace determines the lengths of answers.

    With `plans_ahead` a step is planned when the one before it starts, so requests that arrive later miss it. If that
    plan has no work, another one is made at the end of the running step.
    """

    def __init__(
        self,
        scheduler: BaseScheduler,
        cost: StepCostModel,
        clock: VirtualClock,
        stages: Stages | None = None,
        plans_ahead: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.stages = stages or Stages()
        self.num_steps = 0
        self.waits_for_stage = False
        self._cost = cost
        self._clock = clock
        self._live: dict[str, LiveRequest] = {}
        self._step: ScheduleOutput | None = None
        self._copies: list[KVMigration] = []
        self._plans_ahead = plans_ahead
        self._next: ScheduleOutput | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a step is running."""
        return self._step is not None

    @property
    def num_live(self) -> int:
        """The number of requests on this worker."""
        return len(self._live)

    def share_requests(self, other: "Worker") -> None:
        """Shares the request table with another worker of the same scheduler: they serve the same requests in turn."""
        self._live = other._live

    def submit(self, live: LiveRequest) -> None:
        """Queues a request. Raises ValueError if the scheduler rejects it."""
        self.scheduler.add_request(live.request)
        self._live[live.request.request_id] = live

    def receive(self, live: LiveRequest) -> None:
        """Queues a request with KV from another worker. Raises ValueError if the scheduler rejects it."""
        assert isinstance(self.scheduler, PDScheduler), "only PDScheduler accepts requests with KV"
        self.scheduler.add_received(live.request)
        self._live[live.request.request_id] = live

    def start_step(self) -> float | None:
        """Starts the planned step, or a new one; returns its duration in seconds, or None if it computes nothing."""
        planned, self._next = self._next, None
        if planned is not None and not _has_work(planned):
            self._commit(planned, [])
            planned = None
        step = planned or self._plan()
        if not _has_work(step):
            self._commit(step, [])
            return None
        self._step = step
        self.num_steps += 1
        duration = self._cost.step_s(work_of(step))
        if self._plans_ahead:
            self._next = self._plan()
        return duration

    def take_copies(self) -> list[KVMigration]:
        """The copies planned since the last call."""
        copies, self._copies = self._copies, []
        return copies

    def end_step(self) -> list[LiveRequest]:
        """Commits the running step; returns the requests that leave the worker with it.

        These include requests that the scheduler ended early because they became too long for the KV pool.
        """
        step, self._step = self._step, None
        assert step is not None, "a step ended that never started"
        left: list[LiveRequest] = []
        for request in _requests_with_token(step):
            live = self._live[request.request_id]
            request.output_token_ids.append(0)
            _record_token(live, self._clock.now)
            live.num_left -= 1
            if not live.num_left:
                left.append(live)
        ended_early = self._commit(step, [live.request.request_id for live in left])
        left += [self._live[request_id] for request_id in ended_early]
        for live in left:
            live.timeline.num_output_tokens -= live.num_left
            del self._live[live.request.request_id]
        return left

    def _plan(self) -> ScheduleOutput:
        step = self._schedule()
        for request in step.preempted_requests:
            self._live[request.request_id].timeline.num_preemptions += 1
        self._copies += step.kv_migrations
        return step

    def _schedule(self) -> ScheduleOutput:
        if isinstance(self.scheduler, PDScheduler):
            return self.scheduler.plan_ahead()
        return self.scheduler.schedule()

    def _commit(self, step: ScheduleOutput, finished: list[str]) -> list[str]:
        if isinstance(self.scheduler, RunningFirstScheduler):  # it may have the steps of other workers in flight
            return self.scheduler.update_after_step(finished, step_id=step.step_id)
        return self.scheduler.update_after_step(finished)


class RoleWorker(Worker):
    """One of the two workers of a scheduler in strict mode, with its own steps."""

    scheduler: PDScheduler

    def __init__(self, scheduler: PDScheduler, cost: StepCostModel, clock: VirtualClock, role: Role) -> None:
        super().__init__(scheduler, cost, clock)
        self._role: Role = role

    def _schedule(self) -> ScheduleOutput:
        return self.scheduler.schedule(self._role)

    def _commit(self, step: ScheduleOutput, finished: list[str]) -> list[str]:
        pending = [copy.request_id for copy in step.kv_migrations]
        return self.scheduler.update_after_step(finished, pending, step.step_id)


def _has_work(step: ScheduleOutput) -> bool:
    return bool(step.prefill_batch or step.decode_batch)


def _requests_with_token(step: ScheduleOutput) -> list[Request]:
    """The requests that get a token in the step: those with their last prompt chunk, and the decodes."""
    prefill = step.prefill_batch.chunks if step.prefill_batch else []
    decode = step.decode_batch.requests if step.decode_batch else []
    return [chunk.request for chunk in prefill if chunk.is_last] + list(decode)


def _record_token(live: LiveRequest, now: float) -> None:
    timeline = live.timeline
    if timeline.first_token_s is None:
        timeline.first_token_s = now
    else:
        timeline.gaps_s.append(now - live.last_token_s)
    live.last_token_s = now


def work_of(step: ScheduleOutput) -> StepWork:
    """The work of a step, as the cost models see it."""
    chunks = step.prefill_batch.chunks if step.prefill_batch else ()
    prompts = [PromptChunk(chunk.start, chunk.num_tokens) for chunk in chunks]
    decodes = step.decode_batch
    if decodes is None:
        return StepWork(prompts)
    return StepWork(prompts, decodes.batch_size, _num_context_tokens(decodes))


def _num_context_tokens(decodes: Batch) -> int:
    if isinstance(decodes, DecodeStepBatch):
        return sum(decodes.offsets) + (decodes.tick + 1) * decodes.batch_size
    return sum(request.total_tokens for request in decodes.requests)
