"""The prefill/decode scheduler: continuous batching with chunked prefill over paged KV, in three modes.

A request goes waiting -> started (prefill) -> [migrating, in strict mode] -> decoding -> finished, and from any running
state back to waiting when it is preempted. Nothing counts as computed before `update_after_step` commits the step; a
step that was planned and not committed is rolled back by the next `schedule`, at no cost but the planning.
"""

from collections.abc import Collection, Iterable

from sageLLM.runtime.scheduler.base import SchedulerStalledError
from sageLLM.runtime.scheduler.batch import Chunk, ScheduleOutput
from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.scheduler.plan import Flight, Role, StepPlan
from sageLLM.runtime.scheduler.recovery import Recovery
from sageLLM.runtime.scheduler.request import Request, RequestStatus

__all__ = ["PDScheduler", "PDSchedulerConfig"]


class PDScheduler(Recovery):
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

    def schedule(self, role: Role | None = None) -> ScheduleOutput:
        """Plan the next step. A planned step that was not committed is rolled back first.

        In strict mode the two workers may step each at its own pace: `role` plans the next step of that worker alone,
        while a step of the other one may be in flight. Commit with `update_after_step(..., step_id=output.step_id)`.
        Copies are handed out with the prefill worker's steps. If a step fails after a later one of the other worker has
        ended, the next output repeats the blocks that it had freed.
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
            self._swapping.pop(copy.seq_id, None)

    def _take_flight(self, step_id: int | None) -> Flight | None:
        if step_id is None:
            return self._flights.popleft() if self._flights else None
        for flight in self._flights:
            if flight.step_id == step_id:
                self._flights.remove(flight)
                return flight
        raise ValueError(f"step {step_id} is not in flight; it was committed or rolled back")

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


def _remove_last(blocks: list[int], block: int) -> bool:
    """Remove the last occurrence of a block; False if there is none."""
    for index in range(len(blocks) - 1, -1, -1):
        if blocks[index] == block:
            del blocks[index]
            return True
    return False
