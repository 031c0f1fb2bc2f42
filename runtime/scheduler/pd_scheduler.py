"""The prefill/decode scheduler: continuous batching with chunked prefill over paged KV, in three modes.

A request goes waiting -> started (prefill) -> [migrating, in strict mode] -> decoding -> finished, and from any running
state back to waiting when it is preempted. Nothing counts as computed before `update_after_step` commits the step; a
step that was planned and not committed is rolled back by the next `schedule`, at no cost but the planning.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from sageLLM.runtime.scheduler.base import BaseScheduler, SchedulerStalledError
from sageLLM.runtime.scheduler.batch import Chunk, KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.scheduler.decode import DecodePhase
from sageLLM.runtime.scheduler.forks import ForkLine
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.modes import ModeChooser
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import DecodePlan, Flight, Role, StepPlan
from sageLLM.runtime.scheduler.policy import Policy, make_policy
from sageLLM.runtime.scheduler.prefill import PrefillPhase
from sageLLM.runtime.scheduler.queues import TurnQueue
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.stats import SchedulerCounters
from sageLLM.runtime.scheduler.transfer import Transfer, TransferEvent, TransferPhase, TransferState

__all__ = ["PDScheduler", "PDSchedulerConfig"]


class PDScheduler(BaseScheduler):
    """Schedules prefill and decode in the mode that the config names.

    - `kv_budget` sizes the KV pool (in strict mode both pools). Without it blocks are numbered from 0 without limit,
      reused as they come back: nothing is ever refused or preempted for space, and the engine must grow its cache
      with the peak.
    - `max_model_len` bounds prompt + output of a request.
    - `clock` gives the times stamped on requests, in seconds; no decision depends on it. Whoever passes one stamps
      `arrival_time` with the same.

    At most `max_batch_size` (the larger of the two batch sizes) requests hold KV at once.

    Preemption recomputes: the victim, always the running request that ranks last, frees its blocks and goes back to the
    waiting line at its old rank; later its prompt and the outputs so far are prefilled again, and the last chunk yields
    the next token. The running request that ranks first is never a victim, so there is always progress.
    """

    def __init__(
        self,
        config: PDSchedulerConfig | None = None,
        *,
        kv_budget: KVBudget | None = None,
        max_model_len: int | None = None,
        clock: Callable[[], float] = time.time,
        policy: Policy | None = None,
        mode_chooser: ModeChooser | None = None,
    ) -> None:
        self.config = config or PDSchedulerConfig()
        super().__init__(
            max_batch_size=max(self.config.max_prefill_batch_size, self.config.max_decode_batch_size),
            max_tokens=max(self.config.max_prefill_tokens, self.config.max_decode_tokens),
            policy=policy or make_policy(self.config.policy, self.config.tenant_weights),
            max_overtakes=self.config.max_overtakes,
        )
        if (self.config.mode == "auto") != (mode_chooser is not None):
            raise ValueError("mode 'auto' needs a mode_chooser, and no other mode takes one")
        is_split = self.config.mode == "strict"
        self.kv = KVPlacement(kv_budget, is_split, self.config.enable_prefix_caching)
        self.limits = SequenceLimits(max_model_len, self.kv.max_tokens, self.kv.block_size)
        self._clock = clock
        self._mode_chooser = mode_chooser
        self._prefill = PrefillPhase(self.waiting_queue, self._can_admit, self._admit)
        self._decode = DecodePhase(
            self.kv.block_size, self.limits, self._grow, self.kv.extend_each, self.config.max_decode_context_tokens
        )
        self._migration = TransferPhase(self.kv, self.config.transfer)
        # Ended while the device may still touch their blocks, with the newest step that may.
        self._limbo: dict[str, tuple[Request, int]] = {}
        self._flights: deque[Flight] = deque()
        self._received: set[str] = set()
        self._swapping: set[str] = set()
        self._forks = ForkLine()
        self._next_plan = StepPlan()
        self._num_consecutive_decodes = 0
        self._num_steps = 0
        self._counters = SchedulerCounters()

    # --- the lines ---

    @property
    def max_seq_len(self) -> int | None:
        """The longest prompt + output that any request can reach, in tokens; None when nothing bounds it."""
        return self.limits.max_seq_len

    @property
    def prefill_queue(self) -> list[Request]:
        """All requests with prompt left to compute, waiting or started, by rank."""
        return sorted([*self.waiting_queue, *self._prefill.started.values()], key=lambda request: request.rank)

    @property
    def decode_queue(self) -> TurnQueue[Request]:
        """The requests that decode, the next one to be served first."""
        return self._decode.queue

    def why_not_acceptable(self, request: Request) -> str | None:
        """The reason why `add_request` would refuse, or None."""
        reason = super().why_not_acceptable(request)
        if reason is not None:
            return reason
        if request.request_id in self._forks:
            return f"request {request.request_id!r} is already being served; ids of live requests must differ"
        if request.request_id in self._limbo or request.request_id in self._swapping:
            return f"request {request.request_id!r} was aborted in the step in flight; its id is free after that step"
        return self.limits.why_too_long(request)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it is empty, was used before, has a live one's id, or can never run."""
        super().add_request(request)
        if self._mode_chooser is not None:
            self._mode_chooser.observe(request)
        self.kv.track(request)
        parent = request.fork_of
        if parent is not None and self._can_wait_for(parent, request):
            self.waiting_queue.remove(request)
            self._forks.add(request, parent)

    def _can_wait_for(self, parent: Request, fork: Request) -> bool:
        is_live = self._find(parent.request_id) is parent
        is_new = not parent.output_token_ids and parent.seat is None and parent.request_id not in self._forks
        return is_live and is_new and not self.kv.is_split and parent.prompt_token_ids == fork.prompt_token_ids

    def forks_of(self, request_id: str) -> list[Request]:
        """The forks that wait for this request's prefill; each gets a first token from its last chunk's logits."""
        return self._forks.of(request_id)

    def get_num_waiting(self) -> int:
        """Requests without KV: new ones, preempted ones, and forks."""
        return len(self.waiting_queue) + len(self._forks)

    def _find(self, request_id: str) -> Request | None:
        running = self.running_requests.get(request_id)
        return running or self.waiting_queue.get(request_id) or self._forks.get(request_id)

    def add_received(self, request: Request) -> None:
        """Queue a request whose prompt was computed elsewhere: it has its first output token, and decodes at once.

        It gets blocks for all its tokens; whoever sent its KV fills them when the step that announces them runs. If it
        is preempted it is computed from its first token, here. Raises ValueError as `add_request` does.
        """
        if self.kv.is_split:
            raise ValueError("in strict mode requests are prefilled by the scheduler's own prefill worker")
        num_tokens = request.total_tokens - 1
        if not request.output_token_ids or request.num_computed_tokens != num_tokens:
            raise ValueError(
                f"request {request.request_id!r} has {request.num_computed_tokens} computed tokens; "
                "a received one has all its tokens computed but the newest output token"
            )
        self.add_request(request)
        self.kv.forget(request)  # it shares no blocks: all of them will be written to
        self._received.add(request.request_id)

    def abort_request(self, request_id: str) -> bool:
        """End a request in whatever state it is; False when no live request has this id.

        If a step is in flight, the request's part of it is ignored, outputs included, and its blocks return to the pool
        when the step ends.
        """
        request = self._find(request_id)
        if request is None:
            return False
        self._retire(request)
        self._counters.total_aborted += 1
        return True

    # --- planning ---

    def schedule(self, role: Role | None = None) -> ScheduleOutput:
        """Plan the next step. A planned step that was not committed is rolled back first.

        In strict mode the two workers may step each at its own pace: `role` plans the next step of that worker alone,
        while a step of the other one may be in flight. Commit with `update_after_step(..., step_id=output.step_id)`.
        Copies are handed out with the prefill worker's steps.
        """
        if role is not None and not self.kv.is_split:
            raise ValueError("only in strict mode do the workers have steps of their own: schedule() without a role")
        if self._flights:
            self._roll_back_flights(role)
        return self._plan_step(role)

    def plan_ahead(self) -> ScheduleOutput:
        """Plan the step after the one in flight, which goes on; at most one step is planned ahead.

        A request whose next token the step in flight computes is decoded again, one token further: the engine reads
        that token where the step in flight leaves it. Requests that may end by length with the step in flight are left
        out. One that ends otherwise (a stop token, an abort) has a chunk in the step planned ahead: its result does not
        count, and its blocks are given to others only when that step is over. Roll back with `rollback_ahead`.
        """
        if len(self._flights) > 1:
            raise RuntimeError(
                "a step is planned ahead already; commit the step in flight with update_after_step first"
            )
        if self._flights and not self.kv.is_split:
            self._seat_those_in_flight()
        return self._plan_step(None)

    def _seat_those_in_flight(self) -> None:
        """Whose last chunk of prefill is in flight decodes next, unless its one token is all that it may have."""
        for chunk in self._flights[0].prefill_chunks:
            request = chunk.request
            is_live = request.request_id in self.running_requests and request.seat is None
            if chunk.is_last and is_live and self.limits.num_outputs_left(request) > 1:
                del self._prefill.started[request.request_id]
                self._decode.join_ahead(request)

    def _plan_step(self, role: Role | None) -> ScheduleOutput:
        self._cancel_out_unheard()
        plan, self._next_plan = self._next_plan, StepPlan()
        streak_before = self._num_consecutive_decodes
        if (self._received or self.preempted_requests) and role != "prefill":
            self._admit_ready(plan)
        self._plan_batches(plan, role)
        if self.kv.is_split and role != "decode":
            now = self._clock() if self.config.transfer.lease_s is not None else 0.0
            plan.to_cancel = self._migration.expire(now)
            self._migration.plan(plan, now)
        if plan.prefill:
            self._num_consecutive_decodes = 0
        elif plan.decode:
            self._num_consecutive_decodes += 1
        output = plan.to_output(self._num_steps)
        output.kv_blocks_to_free, self.kv.freed = self.kv.freed, []
        output.prefill_blocks_to_free, self.kv.freed_prefill = self.kv.freed_prefill, []
        self._num_steps += 1
        self._flights.append(Flight(output, plan.decode, streak_before, role, plan.block_copies))
        self._counters.count_plan(output)
        if output.is_empty and not self._may_idle(role):
            raise SchedulerStalledError(f"nothing planned although requests wait: {self.get_stats()}")
        return output

    def _cancel_out_unheard(self) -> None:
        """What was given to a request that left before the engine heard of it, and was freed since, needs no word."""
        given, freed = self._next_plan.given, self.kv.freed
        for request_id in [i for i in given if i not in self.running_requests]:
            given[request_id] = [block for block in given[request_id] if not _remove_last(freed, block)]
            if not given[request_id]:
                del given[request_id]

    def _plan_batches(self, plan: StepPlan, role: Role | None) -> None:
        match self.config.mode:
            case "time_share":
                self._plan_time_share(plan, self.config.max_prefill_tokens)
            case "hybrid":
                self._plan_hybrid(plan, self.config.prefill_chunk_size)
            case "auto":
                self._plan_auto(plan)
            case "strict":
                if role != "prefill":
                    self._decode.plan(plan, self.config.max_decodes, bool(self._flights) and role is None)
                if role != "decode":
                    self._prefill.plan(plan, self.config.max_prefill_tokens, self.config.max_prefill_batch_size)

    def _plan_auto(self, plan: StepPlan) -> None:
        assert self._mode_chooser is not None, "the constructor checks it"
        choice = self._mode_chooser.choose(self)
        most, num_tokens = self.config.max_prefill_tokens, choice.max_prefill_tokens
        if choice.mode == "hybrid":
            self._plan_hybrid(plan, self.config.prefill_chunk_size if num_tokens is None else num_tokens)
        elif choice.mode == "time_share":
            self._plan_time_share(plan, most if num_tokens is None else min(most, num_tokens))
        else:
            self._prefill.plan(
                plan, most if num_tokens is None else min(most, num_tokens), self.config.max_prefill_batch_size
            )
            if not plan.prefill:
                self._decode.plan(plan, self.config.max_decodes, bool(self._flights))

    def _plan_time_share(self, plan: StepPlan, max_prefill_tokens: int) -> None:
        is_prefill_due = self._num_consecutive_decodes >= self.config.max_consecutive_decodes
        if self.decode_queue and not (is_prefill_due and self._prefill.has_work()):
            self._decode.plan(plan, self.config.max_decodes, bool(self._flights))
        if plan.decode is None:  # none there, not their turn, or all of them preempted
            self._prefill.plan(plan, max_prefill_tokens, self.config.max_prefill_batch_size)

    def _plan_hybrid(self, plan: StepPlan, chunk_size: int) -> None:
        """One token budget: decodes first, but never so many that a prefill with a place cannot advance."""
        budget = self.config.max_prefill_tokens
        kept_for_prefill = min(chunk_size, budget // 2) if self._prefill.has_work() else 0
        self._decode.plan(plan, min(self.config.max_decodes, budget - kept_for_prefill), bool(self._flights))
        num_left = min(chunk_size, budget - plan.num_decodes)
        self._prefill.plan(plan, num_left, self.config.max_prefill_batch_size)

    def _may_idle(self, role: Role | None) -> bool:
        is_copying = bool(self._migration.copying or self._swapping or self._limbo)
        if is_copying or any(not flight.output.is_empty for flight in self._flights):
            return True
        if not (self.running_requests or self.waiting_queue):
            return True
        if role == "decode":
            return not self.decode_queue
        head = self.waiting_queue.peek()
        waits_for_decoder = bool(self.decode_queue) or (head is not None and self._is_ready(head))
        return role == "prefill" and waits_for_decoder

    def _can_admit(self, request: Request) -> bool:
        """Whether the request may start. A preempted one waits for some room beside its own, lest it fall again."""
        has_seat = len(self.running_requests) < self.max_batch_size
        if not has_seat or self._is_ready(request) or self._is_in_flight(request):
            return False
        return self.kv.can_admit(request, self._num_tokens_reserved(request), self._headroom(request))

    def _is_in_flight(self, request: Request) -> bool:
        """Whether a step in flight still computes something of a request that has lost its KV since."""
        return any(request.request_id in flight.void and flight.computes(request) for flight in self._flights)

    def _headroom(self, request: Request) -> int:
        """Blocks to leave to the decodes: a preempted request comes back if these last for two steps of them."""
        if request.status is not RequestStatus.PREEMPTED:
            return 0
        return -(-2 * len(self.decode_queue) // self.kv.block_size)

    def _is_ready(self, request: Request) -> bool:
        """Whether the request needs no prefill: its KV was received or is in a tier (or on its way there)."""
        swapped = self.kv.decode
        request_id = request.request_id
        return request_id in self._received or swapped.is_swapped(request_id) or swapped.is_in_transfer(request_id)

    def _num_tokens_reserved(self, request: Request) -> int:
        return self.limits.num_tokens_reserved(request, self.config.enable_preemption)

    def _admit(self, request: Request, plan: StepPlan) -> None:
        admission = self.kv.admit(request, self._num_tokens_reserved(request))
        plan.give(request, admission.taken_blocks)
        if admission.num_cached_tokens:
            self._counters.total_cached_tokens += admission.num_cached_tokens
            plan.num_cached[request.request_id] = admission.num_cached_tokens
            request.compute_up_to(admission.num_cached_tokens)
            request.plan_up_to(admission.num_cached_tokens)
        self._enter(request)
        if self.kv.is_split:
            self._migration.admit(request)

    def _enter(self, request: Request) -> None:
        request.status = RequestStatus.PREFILLING
        self.running_requests[request.request_id] = request
        self.preempted_requests.pop(request.request_id, None)

    def _admit_ready(self, plan: StepPlan) -> None:
        """Those who need no prefill decode as soon as they are at the head of the line and have a place."""
        while (head := self.waiting_queue.peek()) is not None and len(self.running_requests) < self.max_batch_size:
            if not (self._take_in_received(head, plan) or self._swap_in(head, plan)):
                return
            self._start_decoding(head)

    def _take_in_received(self, request: Request, plan: StepPlan) -> bool:
        num_tokens = self._num_tokens_reserved(request)
        if request.request_id not in self._received or not self.kv.can_admit(request, num_tokens, 0):
            return False
        self.waiting_queue.admit(request)
        self._admit(request, plan)
        self.kv.track(request)
        self._received.discard(request.request_id)
        return True

    def _swap_in(self, request: Request, plan: StepPlan) -> bool:
        num_tokens = self._num_tokens_reserved(request)
        if not self.kv.decode.can_swap_in(request.request_id, num_tokens, self._headroom(request)):
            return False
        self.waiting_queue.admit(request)
        copy, table = self.kv.swap_in(request, num_tokens)
        plan.give(request, table)
        plan.tier_copies[request.request_id] = copy
        self._swapping.add(request.request_id)
        self._enter(request)
        return True

    # --- preemption ---

    def _grow(self, request: Request, plan: StepPlan) -> bool:
        """Give a decode the block of its next token, preempting others or itself; False when it sits this step out."""
        num_tokens = request.num_planned_tokens + 1
        while not self.kv.can_extend(request, num_tokens):
            if self.kv.decode.num_promised_blocks > plan.num_sitting_out:
                plan.num_sitting_out += 1
                return False
            pinned = self._pinned()
            victim = self._victim(pinned)
            assert self.config.enable_preemption, "a request outgrew what was reserved for it"
            if victim is None or (victim is request and pinned):
                return False  # what is pinned will soon decode and can be preempted in its stead
            self._preempt(victim, plan)
            if victim is request:
                return False
        plan.give(request, self.kv.extend(request, num_tokens))
        return True

    def _victim(self, pinned: Collection[str]) -> Request | None:
        candidates = (r for r in self.running_requests.values() if r.request_id not in pinned)
        return max(candidates, key=lambda request: request.rank, default=None)

    def _pinned(self) -> Collection[str]:
        """Who cannot be preempted: its KV is being copied, or the prefill worker is busy with it in its own step."""
        busy = [c.request.request_id for f in self._flights if f.role == "prefill" for c in f.prefill_chunks]
        return {*busy, *self._migration.copying, *self._swapping}

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        plan.preempted.append(request)
        if not self._swap_out(request, plan):
            plan.give(request, self._requeue(request, unannounced=plan.drop(request)))

    def _swap_out(self, request: Request, plan: StepPlan) -> bool:
        """Keep a decoding victim's KV in a tier. What a step in flight computes of it is written before the copy."""
        if self.config.preemption_mode != "swap" or request.status is not RequestStatus.DECODING:
            return False
        num_tokens = request.num_planned_tokens
        copy = self.kv.swap_out(request, num_tokens)
        if copy is None:
            return False
        if num_tokens > request.num_computed_tokens:
            self._flights[-1].swapped[request.request_id] = request
        plan.tier_copies[request.request_id] = copy
        self._swapping.add(request.request_id)
        self._go_back(request)
        request.kv_block_ids = []
        self._counters.total_swaps += 1
        return True

    def _requeue(self, request: Request, unannounced: Collection[int] = ()) -> list[int]:
        """Take a request's KV away; it waits at its old rank to be computed again.

        Returns those of the `unannounced` blocks that others use.
        """
        self._counters.total_recomputed_tokens += request.num_computed_tokens
        self._go_back(request)
        still_shared = self.kv.release(request, unannounced)
        self._next_plan.forget(request)
        request.forget_progress()
        return still_shared

    def _go_back(self, request: Request) -> None:
        self._leave_line(request)
        self._migration.leave(request, TransferEvent.LOSE)
        self._release_forks(request)
        for flight in self._flights:
            flight.void.add(request.request_id)
        self._counters.total_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.preempted_requests[request.request_id] = request
        self.waiting_queue.push(request)

    # --- committing ---

    def update_after_step(
        self,
        finished_request_ids: Iterable[str],
        pending_migrations: Collection[str] = (),
        step_id: int | None = None,
    ) -> list[str]:
        """Commit a step in flight, end the finished requests, and return the ids that the scheduler itself ended.

        The step is the one with this `step_id`, or the oldest.

        The step's migrations count as done, except the ids in `pending_migrations`: those wait for
        `confirm_migrations`. The scheduler ends a request, as a last resort, whose output has `max_new_tokens` tokens
        or whose sequence has `max_seq_len`; an engine that stops there itself gets an empty list. Unknown finished
        ids were aborted and are ignored.
        """
        flight = self._take_flight(step_id)
        ended: list[Request] = []
        if flight is not None:
            ended = self._commit(flight)
            self._finish_swaps(flight.output)
            if flight.output.kv_migrations:
                for piece in flight.output.kv_migrations:
                    if piece.request_id not in pending_migrations:
                        self._receive(self._migration.arrive_piece(piece))
        for request_id in finished_request_ids:
            request = self._find(request_id)
            if request is not None:
                self._finish(request)
        unexpected = [request for request in ended if request.status is not RequestStatus.FINISHED]
        for request in unexpected:
            self._finish(request)
        if self._limbo:
            self._empty_limbo()
        return [request.request_id for request in unexpected]

    def _finish_swaps(self, output: ScheduleOutput) -> None:
        for copy in output.tier_copies:
            self.kv.finish_swap(copy.seq_id)
            self._swapping.discard(copy.seq_id)

    def fail_swaps(self, request_ids: Iterable[str]) -> None:
        """Copies between tiers of these requests failed. They are computed again; a step in flight that holds the
        copies, or chunks of these requests, must be rolled back first.
        """
        for request_id in request_ids:
            if request_id not in self._swapping:
                continue
            self._drop_swap(request_id)
            request = self._find(request_id)
            if request is not None:
                self._lose_swapped(request)

    def _drop_swap(self, request_id: str) -> None:
        self._swapping.discard(request_id)
        self._next_plan.tier_copies.pop(request_id, None)
        freed = self.kv.abort_swap(request_id)
        if freed:
            unheard = self._next_plan.given.pop(request_id, [])
            self.kv.freed += [block for block in freed if block not in unheard]

    def _lose_swapped(self, request: Request) -> None:
        """What a tier has of this request is lost."""
        if request.request_id in self.running_requests:
            self._requeue_now(request)
        self._counters.total_recomputed_tokens += request.num_computed_tokens
        self.kv.release_swapped(request)
        request.forget_progress()

    def _take_flight(self, step_id: int | None) -> Flight | None:
        if step_id is None:
            return self._flights.popleft() if self._flights else None
        for flight in self._flights:
            if flight.step_id == step_id:
                self._flights.remove(flight)
                return flight
        raise ValueError(f"step {step_id} is not in flight; it was committed or rolled back")

    def rollback_step(self) -> None:
        """Forget the steps in flight, say because the device failed: their tokens and copies are planned again.

        Admissions and preemptions stand; blocks given or freed are announced again by the next output.
        """
        self._roll_back_flights(None)

    def _roll_back_flights(self, role: Role | None) -> None:
        """Roll back, the newest first, the steps of one worker, or all."""
        for flight in list(reversed(self._flights)):
            if role is None or flight.role == role:
                self._flights.remove(flight)
                self._roll_back(flight)
        self._empty_limbo()

    def rollback_ahead(self) -> None:
        """Forget the step that was planned ahead; the one in flight goes on."""
        if len(self._flights) > 1:
            self._roll_back(self._flights.pop())
            self._empty_limbo()

    def _roll_back(self, flight: Flight) -> None:
        output = flight.output
        for migration in output.kv_migrations:
            was_announced = output.kv_blocks_to_allocate.pop(migration.request_id, None) is not None
            self._migration.take_back(migration, was_announced)
        self._migration.ask_again(output.migrations_to_cancel)
        for chunk in flight.prefill_chunks:
            self._take_back(chunk)
        if flight.decode is not None:
            self._decode.roll_back(flight.decode)
        self._num_consecutive_decodes = flight.streak_before
        self._announce_again(flight)

    def _take_back(self, chunk: Chunk) -> None:
        """A chunk of prefill was not computed after all."""
        request = chunk.request
        if request.request_id not in self.running_requests:
            return
        if request.seat is not None:  # it was to decode in the step planned ahead
            self._decode.leave(request)
            self._prefill.started[request.request_id] = request
        request.plan_up_to(chunk.start)

    def _announce_again(self, flight: Flight) -> None:
        """The engine forgets what this output said of blocks and copies; the next one says it again."""
        output, plan = flight.output, self._next_plan
        live = self.running_requests.keys() | self._limbo.keys() | self._swapping
        given = {i: list(b) for i, b in output.kv_blocks_to_allocate.items() if i in live or not self.kv.is_split}
        for request_id, blocks in plan.given.items():
            given.setdefault(request_id, []).extend(blocks)
        plan.given = given
        plan.num_cached = {i: num for i, num in output.num_cached_tokens.items() if i in live} | plan.num_cached
        plan.block_copies = {i: c for i, c in flight.block_copies.items() if i in live} | plan.block_copies
        for copy in output.tier_copies:
            if self._find(copy.seq_id) is None and copy.seq_id not in self._limbo:
                self._drop_swap(copy.seq_id)
            else:
                plan.tier_copies[copy.seq_id] = copy
        self.kv.freed = output.kv_blocks_to_free + self.kv.freed
        self.kv.freed_prefill = output.prefill_blocks_to_free + self.kv.freed_prefill

    def prefill_to_decode(self, request_ids: Iterable[str]) -> None:
        """Commit the last chunks of these requests' prefills now, before the step ends.

        Optional, as `update_after_step` does the same; it may be called any number of times. Requests whose prefill
        is not complete with the step in flight, or is done already, stay as they are.
        """
        if not self._flights:
            return
        flight = self._flights[0]
        last = {chunk.request.request_id: chunk for chunk in flight.prefill_chunks if chunk.is_last}
        for request_id in request_ids:
            if request_id in last and request_id not in flight.void:
                self._commit_prefill(last[request_id], self._clock())
                flight.void.add(request_id)

    def confirm_migrations(self, request_ids: Iterable[str]) -> None:
        """The KV of these requests has arrived on the decode worker (on all of its ranks): they may decode."""
        for request_id in request_ids:
            self._receive(self._migration.arrive(request_id))
        if self._limbo:
            self._empty_limbo()

    def acknowledge_migration(
        self, request_id: str, start: int, attempt: int, rank: int = 0, layers: Iterable[int] | None = None
    ) -> None:
        """One rank of the decode worker has received some layers (None: all) of one piece of a request's KV.

        `start` and `attempt` are those of the `KVMigration`. The request decodes once every piece is complete; an
        acknowledgement that comes twice, late or for another attempt changes nothing.
        """
        self._receive(self._migration.acknowledge(request_id, start, attempt, rank, layers))
        if self._limbo:
            self._empty_limbo()

    def fail_migrations(self, request_ids: Iterable[str]) -> None:
        """The copies of these requests are over and have not arrived: they are handed out again.

        After `max_attempts` of them the request goes back to the waiting line and is computed from its first token.
        """
        for request_id in request_ids:
            given_up = self._migration.fail(request_id)
            if given_up is not None:
                self._requeue(given_up.request)
        self._empty_limbo()

    def lose_kv(self, role: Role | None = None) -> None:
        """A worker has died and comes back with an empty KV cache: in strict mode one of the two, or both if None.

        The steps that it takes part in are rolled back. What it held is computed again: whose KV was only to be sent is
        sent again, others go back to the waiting line at their rank and emit nothing twice. No copy is under way.
        """
        for flight in list(reversed(self._flights)):
            if role is None or flight.role in (None, role):
                self._flights.remove(flight)
                self._roll_back(flight)
        lost: list[Request] = []
        if self.kv.is_split and role != "decode":
            lost += self._migration.lose_source()
        if self.kv.is_split and role != "prefill":
            self._migration.lose_target()
        if role != "prefill":
            lost += self.decode_queue
        if not self.kv.is_split:
            lost += self._prefill.started.values()
        for request in lost:
            self._requeue_now(request)
        if role != "prefill":
            self._lose_tiers()
        if role != "decode" or not self.kv.is_split:
            self._forget_cached()
        self._empty_limbo()

    def _forget_cached(self) -> None:
        """Where prompts are computed no KV is left that others could share."""
        for request, _ in self._limbo.values():
            request.forget_progress()
        self.kv.prefill.reset_prefix_cache()

    def _requeue_now(self, request: Request) -> None:
        """Between two steps: what the engine was to hear next of the request's blocks is void, or shared by others."""
        still_shared = self._requeue(request, unannounced=self._next_plan.drop(request))
        self._next_plan.give(request, still_shared)

    def _lose_tiers(self) -> None:
        for request_id in list(self._swapping):
            self._drop_swap(request_id)
        for request in self.preempted_requests.values():
            self._lose_swapped(request)

    def transfer_state(self, request_id: str) -> TransferState | None:
        """Where a request of strict mode stands; None when no live request has this id."""
        if request_id in self.waiting_queue:
            return TransferState.QUEUED
        if request_id not in self.running_requests:
            return None
        transfer = self._migration.transfers.get(request_id)
        return TransferState.DECODING if transfer is None else transfer.state

    def _receive(self, transfer: Transfer | None) -> None:
        """All of a request's KV is there: it goes on in the decode pool."""
        if transfer is None:
            return
        request = transfer.request
        transfer.on(TransferEvent.ALL_ARRIVED)
        self.kv.arrive(request)
        del self._migration.transfers[request.request_id]
        self._start_decoding(request)
        transfer.on(TransferEvent.START)

    def _commit(self, flight: Flight) -> list[Request]:
        """Count the step's tokens as computed; returns the requests that are as long as they may become."""
        candidates: list[Request] = []
        if flight.decode is not None:
            candidates = self._decode.commit(flight.decode)
        for request in flight.swapped.values():
            if request.status is RequestStatus.PREEMPTED:
                request.compute_up_to(request.num_computed_tokens + 1)
        if flight.output.prefill_batch is not None:
            now = self._clock()
            chunks = flight.output.prefill_batch.chunks
            for chunk in chunks:
                self._commit_prefill(chunk, now, is_void=chunk.request.request_id in flight.void)
            candidates = [*(chunk.request for chunk in chunks if chunk.is_last), *candidates]
        is_full = self.limits.is_full
        return [request for request in candidates if is_full(request)]

    def _commit_prefill(self, chunk: Chunk, now: float, is_void: bool = False) -> None:
        request = chunk.request
        if request.status is RequestStatus.FINISHED:
            return
        if chunk.is_last and request.first_token_time is None:
            request.first_token_time = now
        if is_void:
            return
        end = chunk.start + chunk.num_tokens
        request.compute_up_to(end)
        self.kv.publish(request)
        if chunk.is_last:
            self._start_forks(request, now)
        if self.kv.is_split:
            self._migration.computed(request, chunk.is_last)
        if not chunk.is_last:
            return
        if request.seat is not None:
            self._decode.commit_prefill(request, end)
            request.status = RequestStatus.DECODING
            return
        del self._prefill.started[request.request_id]
        if not self.kv.is_split:
            self._start_decoding(request)

    def _start_forks(self, parent: Request, now: float) -> None:
        """The parent's prompt is computed: its forks share it."""
        for fork in self._forks.take(parent.request_id):
            has_seat = fork.output_token_ids and len(self.running_requests) < self.max_batch_size
            shared = self.kv.fork(parent, fork, self._num_tokens_reserved(fork)) if has_seat else None
            if shared is None:
                self._wait_in_line(fork)
                continue
            fork.first_token_time = now
            fork.compute_up_to(parent.num_computed_tokens)
            fork.plan_up_to(parent.num_computed_tokens)
            self._enter(fork)
            new_blocks, copies = shared
            self._next_plan.give(fork, new_blocks)
            self._next_plan.block_copies[fork.request_id] = copies
            self._start_decoding(fork)

    def _release_forks(self, parent: Request) -> None:
        for fork in self._forks.take(parent.request_id):
            self._wait_in_line(fork)

    def _wait_in_line(self, fork: Request) -> None:
        if fork.output_token_ids:
            fork.status = RequestStatus.PREEMPTED
            self.preempted_requests[fork.request_id] = fork
        self.waiting_queue.push(fork)

    def _start_decoding(self, request: Request) -> None:
        request.status = RequestStatus.DECODING
        self._decode.join(request, self._decodes_in_flight)

    @property
    def _decodes_in_flight(self) -> list[DecodePlan]:
        return [flight.decode for flight in self._flights if flight.decode is not None]

    # --- leaving ---

    def _finish(self, request: Request) -> None:
        self._retire(request)
        self._counters.total_finished += 1

    def _retire(self, request: Request) -> None:
        """End a request. Blocks that a step or a copy in flight may touch go back when that is over."""
        self._release_forks(request)
        if request.request_id in self._forks:
            self._forks.remove(request)
            self.kv.forget(request)
        elif request.request_id in self.waiting_queue:
            self.waiting_queue.remove(request)
            self.preempted_requests.pop(request.request_id, None)
            self._received.discard(request.request_id)
            if request.request_id in self._next_plan.tier_copies:
                self._drop_swap(request.request_id)  # the engine is not copying it
            self.kv.release_swapped(request)
            self.kv.forget(request)
        else:
            self._leave_line(request)
            self._migration.leave(request, TransferEvent.END)
            self._limbo[request.request_id] = (request, self._num_steps - 1)
        request.status = RequestStatus.FINISHED
        request.finish_time = self._clock()
        if not self._flights:
            self._empty_limbo()

    def _leave_line(self, request: Request) -> None:
        del self.running_requests[request.request_id]
        if request.seat is not None:
            self._decode.leave(request)
        else:
            self._prefill.started.pop(request.request_id, None)

    def _empty_limbo(self) -> None:
        oldest_in_flight = self._flights[0].step_id if self._flights else self._num_steps
        for request_id, (request, last_step) in list(self._limbo.items()):
            is_copied = request_id in self._migration.copying or request_id in self._swapping
            if last_step < oldest_in_flight and not is_copied:
                still_shared = self.kv.release(request, unannounced=self._next_plan.drop(request))
                self._next_plan.give(request, still_shared)
                self.kv.forget(request)
                del self._limbo[request_id]

    # --- reports ---

    def get_stats(self) -> dict[str, int]:
        """Counters since the start (`total_*`; batches and tokens as planned) and sizes now, of lines and KV blocks."""
        stats = self._counters.as_dict()
        stats["prefill_queue_size"] = len(self._prefill)
        stats["decode_queue_size"] = len(self.decode_queue)
        stats["migrating_size"] = len(self._migration)
        stats["num_waiting"] = self.get_num_waiting()
        stats["num_running"] = self.get_num_running()
        stats["num_preempted"] = len(self.preempted_requests)
        stats["kv_blocks_used"] = self.kv.decode.pool.num_used
        if self.kv.is_split:
            stats["prefill_kv_blocks_used"] = self.kv.prefill.pool.num_used
        return stats

    def check_integrity(self) -> None:
        """Check that each live request is in exactly one line and that exactly the running ones hold blocks."""
        sending = [i for i, t in self._migration.transfers.items() if t.state is TransferState.SENDING]
        lines = [*self._prefill.started, *sending]
        lines += [request.request_id for request in self.decode_queue]
        assert len(set(lines)) == len(lines), "a request is in two lines"
        running = self.running_requests.keys()
        assert set(lines) - self._limbo.keys() == running, f"running requests in no line: {running ^ set(lines)}"
        assert not any(request_id in running for request_id in self._limbo), "an ended request still runs"
        assert not any(request.request_id in running for request in self.waiting_queue), "a request waits and runs"
        waiting_preempted = {r.request_id for r in self.waiting_queue if r.status is RequestStatus.PREEMPTED}
        assert self.preempted_requests.keys() == waiting_preempted, "a preempted request does not wait"
        leaving = [i for i in self.preempted_requests if self.kv.decode.holds(i)]
        assert all(self.kv.decode.is_in_transfer(i) for i in leaving), "a waiting request holds blocks"
        self.kv.check_integrity([*running, *self._limbo, *leaving])


def _remove_last(blocks: list[int], block: int) -> bool:
    """Remove the last occurrence of a block; False if there is none."""
    for index in range(len(blocks) - 1, -1, -1):
        if blocks[index] == block:
            del blocks[index]
            return True
    return False
