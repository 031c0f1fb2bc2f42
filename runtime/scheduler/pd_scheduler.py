"""Prefill/decode scheduler: continuous batching with chunked prefill over paged KV, in four modes.

`PDScheduler` is the interface; the work is done by the objects that it is composed of:

- state (`state.py`): request table, KV placement, pending steps, decode queue, migrations, swaps;
- planning (`StepPlanner`): a `Mode` decides which phases a step runs; `PrefillPhase` admits requests (`Admission`) and
  adds chunks, `DecodePhase` adds decodes and allocates their blocks (`Preemption`);
- `StepCommit` counts executed steps as computed, `Recovery` undoes failed ones;
- `Lifecycle` moves requests between their states for all of these.

A request goes waiting -> prefilling -> [migrating, in strict mode] -> decoding -> finished, and from any running state
back to waiting when it is preempted. Nothing counts as computed before `update_after_step` commits the step; a planned
step that was not committed is rolled back by the next `schedule`.
"""

import time
from collections.abc import Callable, Collection, Iterable

from sageLLM.runtime.scheduler.admission import Admission
from sageLLM.runtime.scheduler.base import BaseScheduler, SchedulerStalledError
from sageLLM.runtime.scheduler.batch import KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.commit import StepCommit
from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.scheduler.decode import DecodePhase
from sageLLM.runtime.scheduler.decode_queue import DecodeQueue
from sageLLM.runtime.scheduler.handover import Handover
from sageLLM.runtime.scheduler.lifecycle import Lifecycle
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.micro_batches import MicroBatches
from sageLLM.runtime.scheduler.migration import Migration
from sageLLM.runtime.scheduler.modes import ModeChooser, OneRole, Phases, SchedulerView, make_mode
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.scheduler.planner import StepPlanner
from sageLLM.runtime.scheduler.policy import Policy, make_policy
from sageLLM.runtime.scheduler.preemption import Preemption
from sageLLM.runtime.scheduler.prefill import PrefillPhase
from sageLLM.runtime.scheduler.queues import RoundRobinQueue
from sageLLM.runtime.scheduler.recovery import Recovery
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.state import SchedulerState
from sageLLM.runtime.scheduler.stats import SchedulerCounters
from sageLLM.runtime.scheduler.steps import StepQueue
from sageLLM.runtime.scheduler.swaps import Swaps
from sageLLM.runtime.scheduler.table import RequestTable
from sageLLM.runtime.scheduler.transfer import TransferState

__all__ = ["PDScheduler", "PDSchedulerConfig"]


class PDScheduler(BaseScheduler):
    """Schedules prefill and decode in the mode that the config names.

    - `kv_budget` sizes the KV pool (in strict mode both pools). Without it blocks are numbered from 0 without limit and
      reused as they are freed: nothing is refused or preempted for space, and the engine must grow its cache.
    - `max_model_len` bounds prompt + output of a request.
    - `switch_len`: the KV of a sequence of more tokens differs from that of a shorter one at every position (longrope).
      A request that outgrows this length waits at its old rank and is recomputed, as after a preemption.
    - `clock` returns the times stamped on requests, in seconds; no decision depends on it but the lease of a copy
      and those of a `mode_chooser`.
      `Request.arrival_time` must come from the same clock.
    - `mode_chooser` selects the mode of each step in mode `auto`.
    - `num_stages` pipeline stages compute different steps at once. Steps that follow each other therefore decode
      different requests (micro-batches), and `plan_ahead` plans one step more than there are stages.
    - `role` is that of a worker in a group of workers with a scheduler each (`DisaggregatedScheduler`), which numbers
      the requests and moves them by `handover`. A prefill worker keeps the KV of a prompt until it is handed over; a
      decode worker computes no prompt, so its preempted requests wait until they are withdrawn.

    At most `max_batch_size` (the larger of the two batch sizes) requests hold KV at once.

    Preemption recomputes by default: the victim, always the running request with the last rank, frees its blocks and
    waits at its old rank; later its prompt and the outputs so far are prefilled again, and the last chunk yields the
    next token. The running request with the first rank is never a victim, so there is always progress.
    """

    def __init__(
        self,
        config: PDSchedulerConfig | None = None,
        *,
        kv_budget: KVBudget | None = None,
        max_model_len: int | None = None,
        switch_len: int | None = None,
        clock: Callable[[], float] = time.time,
        policy: Policy | None = None,
        mode_chooser: ModeChooser | None = None,
        num_stages: int = 1,
        role: Role | None = None,
    ) -> None:
        self.config = config = config or PDSchedulerConfig()
        self.role = role
        super().__init__(
            max_batch_size=max(config.max_prefill_batch_size, config.max_decode_batch_size),
            max_tokens=max(config.max_prefill_tokens, config.max_decode_tokens),
            policy=policy or make_policy(config.policy, config.tenant_weights),
            max_overtakes=config.max_overtakes,
        )
        self.kv = kv = KVPlacement(kv_budget, config.mode == "strict" and role is None, config.enable_prefix_caching)
        self.limits = SequenceLimits(
            max_model_len,
            kv.max_tokens,
            kv.block_size,
            reserve_output=not config.enable_preemption,
            switch_len=switch_len,
        )
        steps = StepQueue()
        self._state = state = SchedulerState(
            config=config,
            policy=self.policy,
            clock=clock,
            max_batch_size=self.max_batch_size,
            limits=self.limits,
            kv=kv,
            table=RequestTable(self.waiting_queue, self.running_requests, self.preempted_requests),
            steps=steps,
            decodes=DecodeQueue(kv.block_size, self.limits),
            migration=Migration(kv, config.transfer, clock),
            swaps=Swaps(kv, steps),
            counters=SchedulerCounters(),
        )
        self._lifecycle = Lifecycle(state)
        self._admission = Admission(state, self._lifecycle)
        self._commit = StepCommit(state, self._lifecycle)
        self._recovery = Recovery(state, self._lifecycle)
        preemption = Preemption(state, self._lifecycle)
        context_tokens = config.max_decode_context_tokens
        phases = Phases(
            config,
            PrefillPhase(state.table, self._admission),
            DecodePhase(state.decodes, kv, preemption, MicroBatches(steps, self.limits, num_stages), context_tokens),
        )
        self.view = SchedulerView(config, self.max_batch_size, kv.max_tokens, clock)
        self._phases = phases
        mode = make_mode(phases, mode_chooser, self.view)
        self._planner = StepPlanner(state, self._lifecycle, self._admission, mode, num_stages)
        self.handover = Handover(state, self._lifecycle)
        self._mode_chooser = mode_chooser
        self._table, self._steps, self._migration = state.table, state.steps, state.migration
        if role is not None:
            self.set_role(role)

    # --- roles ---

    def set_role(self, role: Role) -> None:
        """Take another role, when no request has blocks here."""
        assert not (self.running_requests or self._table.reserved or self._steps.pending), "the worker is not drained"
        self.role = self._planner.role = role
        self._planner.mode = OneRole(self._phases, role)
        self._table.holds_prefilled = role == "prefill"

    @property
    def can_plan(self) -> bool:
        """Whether a worker of one role has something to compute or to copy."""
        if self.role == "prefill":
            return self._phases.prefill.has_work()
        return self._phases.decode.has_work() or any(map(self._admission.needs_no_prefill, self.waiting_queue))

    def _number(self, request: Request) -> None:
        if self.role is None:
            super()._number(request)

    # --- requests ---

    @property
    def max_seq_len(self) -> int | None:
        """The longest prompt + output that any request can reach, in tokens; None when unbounded."""
        return self.limits.max_seq_len

    @property
    def prefill_queue(self) -> list[Request]:
        """All requests with prompt tokens to compute, waiting or started, by rank."""
        return sorted([*self.waiting_queue, *self._table.prefilling.values()], key=lambda request: request.rank)

    @property
    def decode_queue(self) -> RoundRobinQueue[Request]:
        """The decoding requests, the next one to be served first."""
        return self._state.decodes.requests

    def get_num_waiting(self) -> int:
        """Number of requests without KV: new ones, preempted ones, and forks."""
        return len(self.waiting_queue) + len(self._table.forks)

    def why_not_acceptable(self, request: Request) -> str | None:
        """The reason why `add_request` would refuse the request, or None."""
        reason = super().why_not_acceptable(request)
        if reason is not None:
            return reason
        request_id = request.request_id
        if request_id in self._table.forks:
            return f"request {request_id!r} is already being served; ids of live requests must differ"
        if request_id in self._table.pending_free or request_id in self._state.swaps.copying:
            return f"request {request_id!r} was aborted in a pending step; its id can be used again after that step"
        return self.limits.why_too_long(request)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an empty, used or duplicate one, and for one that can never run."""
        super().add_request(request)
        if self._mode_chooser is not None:
            self._mode_chooser.observe(request)
        request.is_long = self.limits.is_long(request)
        self.kv.track(request)

    def _enqueue(self, request: Request) -> None:
        parent = request.fork_of
        if parent is not None and self._can_fork(parent, request):
            self._table.forks.add(request, parent)
        else:
            super()._enqueue(request)

    def _can_fork(self, parent: Request, fork: Request) -> bool:
        is_live = self._table.find(parent.request_id) is parent
        if self.role is not None:
            return False
        is_new = not parent.output_token_ids and parent.slot is None and parent.request_id not in self._table.forks
        return is_live and is_new and not self.kv.is_split and parent.prompt_token_ids == fork.prompt_token_ids

    def add_received(self, request: Request) -> None:
        """Queue a request with a prompt computed elsewhere: it has its first output token, and decodes at once.

        It gets blocks for all its tokens; the sender of its KV fills them when the step that announces them runs. After
        a preemption it is recomputed here from its first token. Raises ValueError as `add_request` does.
        """
        if self.kv.is_split:
            raise ValueError("add_received must not be called in strict mode, which has its own prefill worker")
        num_tokens = request.total_tokens - 1
        if not request.output_token_ids or request.num_computed_tokens != num_tokens:
            raise ValueError(
                f"expected all tokens of received request {request.request_id!r} but the newest output token to be "
                f"computed, got {request.num_computed_tokens} of {request.total_tokens}"
            )
        if num_tokens == self.limits.switch_len:
            request.forget_progress()  # with its output token it has outgrown the KV
            self.add_request(request)
            return
        self.add_request(request)
        self.kv.forget(request)  # it must not share cached blocks: the sender writes to all of its blocks
        self._table.received.add(request.request_id)

    def forks_of(self, request_id: str) -> list[Request]:
        """The forks waiting for this request's prefill; each gets a first token from the logits of its last chunk."""
        return self._table.forks.of(request_id)

    def abort_request(self, request_id: str) -> bool:
        """End a request in any state; False when no live request has this id.

        If a step is pending, the request's part of it is ignored, outputs included, and its blocks return to the pool
        when the step ends.
        """
        request = self._table.find(request_id)
        if request is None:
            return False
        self._lifecycle.end(request)
        self._state.counters.total_aborted += 1
        return True

    def _finish(self, request: Request) -> None:
        self._lifecycle.end(request)
        self._state.counters.total_finished += 1

    # --- planning ---

    def schedule(self, role: Role | None = None) -> ScheduleOutput:
        """Plan the next step. A planned step that was not committed is rolled back first.

        In strict mode each of the two workers may step at its own pace: `role` plans the next step of that worker
        alone, while a step of the other one may be pending. Commit with `update_after_step(..., step_id=...)`. Copies
        are handed out with the prefill worker's steps. If a step fails after a later one of the other worker has ended,
        the next output repeats the blocks that the failed one freed.
        """
        if role is not None and not self.kv.is_split:
            raise ValueError(f"role must be None outside strict mode, got {role!r}")
        if self._steps.pending:
            self._recovery.roll_back(role)
        return self._plan_step(role)

    def plan_ahead(self) -> ScheduleOutput:
        """Plan the step after the pending ones, which continue; at most one step for each stage can be pending.

        A request that gets a token from a pending step is decoded one token further: the engine takes that token from
        the results of the pending step. Requests that may end by length with a pending step are skipped. One that
        ends otherwise (a stop token, an abort) has a chunk in the step planned ahead: its result does not count, and
        its blocks are reused only when that step is over. Roll back with `rollback_ahead`.

        With several stages, no request with a token in one of the newest `num_stages - 1` pending steps is decoded.
        """
        self._planner.decode_ahead()
        return self._plan_step(None)

    def _plan_step(self, role: Role | None) -> ScheduleOutput:
        output = self._planner.plan(role)
        if output.is_empty and not self._planner.may_idle(role):
            raise SchedulerStalledError(f"nothing planned although requests wait: {self.get_stats()}")
        return output

    def promote_kv(self, step: ScheduleOutput, limit: int) -> Collection[str]:
        """Moves up to `limit` KV blocks of the step's decodes from the tier below to free blocks of the device.

        Adds the copies to the step's `block_copies`, and the targets to the blocks that it allocates; returns the
        requests with other blocks than before. Call it for the newest step, and only if that is certain to run: a
        rollback would lose the copies. A step with other copies is left alone, as those may write to the same blocks.
        """
        return self._planner.promote_kv(step, limit)

    # --- commit ---

    def update_after_step(
        self,
        finished_request_ids: Iterable[str],
        pending_migrations: Collection[str] = (),
        step_id: int | None = None,
    ) -> list[str]:
        """Commit a pending step, end the finished requests, and return the ids that the scheduler itself ended.

        The step is the one with this `step_id`, by default the oldest.

        The step's migrations count as done, except the ids in `pending_migrations`: those wait for
        `confirm_migrations`. As a last resort the scheduler ends requests with `max_new_tokens` output tokens or a
        sequence of `max_seq_len`; an engine that stops there itself gets an empty list. Unknown finished ids were
        aborted and are ignored.
        """
        step = self._steps.take(step_id)
        complete: list[Request] = []
        if step is not None:
            complete = self._commit.commit(step)
            for piece in step.output.kv_migrations:
                if piece.request_id not in pending_migrations:
                    self._lifecycle.receive(self._migration.confirm_piece(piece))
        for request_id in finished_request_ids:
            request = self._table.find(request_id)
            if request is not None:
                self._finish(request)
        unexpected: list[str] = []
        for request in complete:
            if request.status is not RequestStatus.FINISHED:
                self._finish(request)
                unexpected.append(request.request_id)
        self._lifecycle.requeue_outgrown()
        self._lifecycle.free_ended()
        return unexpected

    def prefill_to_decode(self, request_ids: Iterable[str]) -> None:
        """Commit the last prefill chunks of these requests now, before the step ends.

        Optional, as `update_after_step` does the same; it may be called any number of times. Requests without a last
        chunk in the oldest pending step, and those committed already, are ignored.
        """
        if self._steps.pending:
            self._commit.commit_prefills(self._steps.pending[0], request_ids)
            self._lifecycle.requeue_outgrown()

    # --- migration ---

    def confirm_migrations(self, request_ids: Iterable[str]) -> None:
        """The KV of these requests has arrived on the decode worker (on all of its ranks): they may decode."""
        for request_id in request_ids:
            self._lifecycle.receive(self._migration.confirm(request_id))
        self._lifecycle.requeue_outgrown()
        self._lifecycle.free_ended()

    def acknowledge_migration(
        self, request_id: str, start: int, attempt: int, rank: int = 0, layers: Iterable[int] | None = None
    ) -> None:
        """One rank of the decode worker has received some layers (None: all) of one piece of a request's KV.

        `start` and `attempt` are those of the `KVMigration`. The request decodes once every piece is complete; a
        repeated or late acknowledgement, or one of another attempt, changes nothing.
        """
        self._lifecycle.receive(self._migration.acknowledge(request_id, start, attempt, rank, layers))
        self._lifecycle.requeue_outgrown()
        self._lifecycle.free_ended()

    def fail_migrations(self, request_ids: Iterable[str]) -> None:
        """The copies of these requests have stopped and not arrived: they are handed out again.

        Copies that have not begun are removed from the outputs of pending steps. After `max_attempts` failures the
        request is requeued and recomputed from its first token.
        """
        self._recovery.fail_migrations(request_ids)

    def transfer_state(self, request_id: str) -> TransferState | None:
        """State of a request of strict mode; None when no live request has this id."""
        if request_id in self.waiting_queue:
            return TransferState.QUEUED
        if request_id not in self.running_requests:
            return None
        transfer = self._migration.transfers.get(request_id)
        return TransferState.DECODING if transfer is None else transfer.state

    # --- recovery ---

    def rollback_step(self) -> None:
        """Forget the pending steps, for example because the device failed: their tokens and copies are planned again.

        Admissions and preemptions remain; allocated and freed blocks are announced again by the next output.
        """
        self._recovery.roll_back(None)

    def rollback_ahead(self) -> None:
        """Forget the step planned ahead; the pending one before it continues."""
        if len(self._steps.pending) > 1:
            self._recovery.roll_back_newest()

    def fail_swaps(self, request_ids: Iterable[str]) -> None:
        """Copies between tiers of these requests failed: the requests are recomputed.

        A pending step with these copies, or with chunks of these requests, must be rolled back first.
        """
        self._recovery.fail_swaps(request_ids)

    def lose_kv(self, role: Role | None = None) -> None:
        """A worker died and restarts with an empty KV cache: in strict mode one of the two, or both if None.

        Its pending steps are rolled back, and no copy is in flight any more. The requests with KV on it are recomputed
        at their old rank, without emitting a token twice; KV that was only to be sent to it is sent again.
        """
        self._recovery.lose_kv(role)

    # --- reports ---

    def get_stats(self) -> dict[str, int]:
        """Counters since the start (`total_*`; batches and tokens as planned), and current queue and pool sizes."""
        stats = self._state.counters.as_dict()
        stats["prefill_queue_size"] = len(self.waiting_queue) + len(self._table.prefilling)
        stats["decode_queue_size"] = len(self.decode_queue)
        stats["migrating_size"] = self._migration.num_sending
        stats["num_waiting"] = self.get_num_waiting()
        stats["num_running"] = self.get_num_running()
        stats["num_preempted"] = len(self.preempted_requests)
        stats["kv_blocks_used"] = self.kv.decode.pool.num_used
        if self.kv.is_split:
            stats["prefill_kv_blocks_used"] = self.kv.prefill.pool.num_used
        return stats

    def check_integrity(self) -> None:
        """Check that every live request is in exactly one state, and that exactly the running ones hold blocks."""
        self._lifecycle.check_integrity()
