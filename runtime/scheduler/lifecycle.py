"""Request lifecycle: the transitions of a request between the states of the request table.

    waiting -> running (prefilling -> [migrating] -> decoding) -> pending free -> gone

A preempted request goes from running back to waiting. A fork goes from its parent's forks to decoding or waiting.
"""

from collections.abc import Collection, Iterable

from sageLLM.runtime.scheduler.plan import PendingStep
from sageLLM.runtime.scheduler.policy import Reranked
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.state import SchedulerState
from sageLLM.runtime.scheduler.transfer import Transfer, TransferEvent, TransferState


class Lifecycle:
    """Moves requests between states, with all that a transition implies for KV blocks, queues and pending steps."""

    def __init__(self, state: SchedulerState) -> None:
        self._policy = state.policy
        self._clock = state.clock
        self._limits = state.limits
        self._kv = state.kv
        self._table = state.table
        self._steps = state.steps
        self._decodes = state.decodes
        self._migration = state.migration
        self._swaps = state.swaps
        self._counters = state.counters

    # --- forward ---

    def run(self, request: Request) -> None:
        """The request has blocks now."""
        if request.num_preemptions == 0:
            self._rerank(self._policy.start(request))
        request.status = RequestStatus.PREFILLING
        self._table.running[request.request_id] = request
        self._table.preempted.pop(request.request_id, None)

    def _rerank(self, change: Reranked | None) -> None:
        if change is not None:
            self._table.waiting.move(change.request, change.rank)

    def start_decoding(self, request: Request) -> None:
        """The KV of the request is complete on the worker that decodes it, or on one that only prefills."""
        if self._table.holds_prefilled:
            self._table.prefilled[request.request_id] = request
            return
        request.status = RequestStatus.DECODING
        self._decodes.join(request, self._steps.decode_plans)
        if self._limits.switch_len is not None:
            self._table.outgrown[request.request_id] = request

    def start_decoding_ahead(self, request: Request, later: Iterable[PendingStep] = ()) -> None:
        """The last prefill chunk of the request is pending; plan its first decode before that is committed.

        `later` are the pending steps after that of the chunk.
        """
        del self._table.prefilling[request.request_id]
        self._decodes.join_ahead(request, [step.plan.decode for step in later if step.plan.decode is not None])

    def stop_decoding_ahead(self, request: Request) -> None:
        """The last prefill chunk was rolled back."""
        self._decodes.leave(request)
        self._table.prefilling[request.request_id] = request

    def receive(self, transfer: Transfer | None) -> None:
        """A transfer is complete: the request goes on in the decode pool. None: nothing is complete yet."""
        if transfer is None:
            return
        request = transfer.request
        transfer.on(TransferEvent.ALL_ARRIVED)
        self._kv.arrive(request)
        del self._migration.transfers[request.request_id]
        self.start_decoding(request)
        transfer.on(TransferEvent.START)

    # --- back to waiting ---

    def requeue(self, request: Request, unannounced: Collection[int] = ()) -> list[int]:
        """Take the KV of a running request away; it waits at its old rank to be recomputed.

        Returns the `unannounced` blocks (allocated in the step being planned) that other requests share.
        """
        self._counters.total_recomputed_tokens += request.num_computed_tokens
        self.suspend(request)
        still_shared = self._kv.release(request, unannounced)
        self._steps.next_plan.forget(request)
        request.forget_progress()
        return still_shared

    def requeue_between_steps(self, request: Request) -> None:
        """Requeue a request while no step is being planned; pending announcements of its blocks are withdrawn."""
        next_plan = self._steps.next_plan
        next_plan.add_blocks(request, self.requeue(request, unannounced=next_plan.drop(request)))

    def requeue_outgrown(self) -> None:
        """Requeue the requests that have outgrown their KV: every token is computed again for the new length.

        Called between steps, when ended requests have left: a request that ends with the token beyond the length is not
        computed again.
        """
        if self._limits.switch_len is None:
            return
        candidates, self._table.outgrown = self._table.outgrown, {}
        for request in candidates.values():
            if request.slot is not None and self._limits.has_outgrown_kv(request):
                self.requeue_between_steps(request)
                self._steps.next_plan.requeued.append(request)
        for request in self._table.preempted.values():  # a token may have arrived after the swap
            if self._kv.decode.is_swapped(request.request_id) and self._limits.has_outgrown_kv(request):
                self.lose_swapped(request)

    def suspend(self, request: Request) -> None:
        """Move a running request back to waiting, at its old rank; its blocks are up to the caller.

        Pending steps may still compute a token of it. The engine may append that token, but the step's KV does not
        count any more, hence `void`.
        """
        self._leave_running(request)
        self._migration.leave(request, TransferEvent.LOSE)
        self.release_forks(request)
        self._steps.void(request)
        self._counters.total_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._table.preempted[request.request_id] = request
        self._table.waiting.push(request)

    def lose_swapped(self, request: Request) -> None:
        """The KV of a swapped request is lost: it will be recomputed."""
        if request.request_id in self._table.running:  # it was being copied back
            self.requeue_between_steps(request)
        self._counters.total_recomputed_tokens += request.num_computed_tokens
        self._kv.release_swapped(request)
        request.forget_progress()

    def release_forks(self, parent: Request) -> None:
        """The parent will not complete its prefill: its forks wait as ordinary requests."""
        for fork in self._table.forks.take(parent.request_id):
            self.queue_fork(fork)

    def rank_fork(self, fork: Request) -> None:
        """Rank a fork that no longer waits for its parent."""
        fork.rank = self._policy.rank(fork)

    def queue_fork(self, fork: Request) -> None:
        """Let a fork wait for admission. One with a first token waits like a preempted request."""
        self.rank_fork(fork)
        if fork.output_token_ids:
            fork.status = RequestStatus.PREEMPTED
            self._table.preempted[fork.request_id] = fork
        self._table.waiting.push(fork)

    # --- the end ---

    def end(self, request: Request) -> None:
        """Finish or abort a live request in any state."""
        self.release_forks(request)
        table, request_id = self._table, request.request_id
        if request_id in table.forks:
            table.forks.remove(request)
            self._kv.forget(request)
        elif request_id in table.waiting:
            table.waiting.remove(request)
            table.preempted.pop(request_id, None)
            table.received.discard(request_id)
            if request_id in self._steps.next_plan.tier_copies:
                self._swaps.drop(request_id)  # the engine has not begun the copy
            self._kv.release_swapped(request)
            self._kv.forget(request)
        else:
            self._leave_running(request)
            self._migration.leave(request, TransferEvent.END)
            newest_step = self._steps.num_planned - 1  # later steps do not contain the request
            table.pending_free[request_id] = (request, newest_step)
        self.end_service(request)
        request.status = RequestStatus.FINISHED
        request.finish_time = self._clock()
        if not self._steps.pending:
            self.free_ended()

    def end_service(self, request: Request) -> None:
        """The policy accounts for the request no longer."""
        self._rerank(self._policy.end(request))

    def leave(self, request: Request) -> None:
        """A running request leaves this scheduler without an end; its blocks are up to the caller."""
        self._leave_running(request)
        self.end_service(request)

    def _leave_running(self, request: Request) -> None:
        del self._table.running[request.request_id]
        if request.slot is not None:
            self._decodes.leave(request)
        else:
            self._table.prefilling.pop(request.request_id, None)
            self._table.prefilled.pop(request.request_id, None)

    def free_ended(self) -> None:
        """Free the blocks of ended requests, and of promoted KV, that no pending step and no copy may touch any more.

        A pending step writes KV into the blocks of its requests even if they have ended since (a stop token, an abort).
        Freed now, a block could be allocated to another request, and that write could overwrite the KV of its prefill.
        """
        self._kv.freed += self._kv.decode.end_step(self._steps.oldest_id - 1)
        pending_free = self._table.pending_free
        if not pending_free:
            return
        next_plan, oldest_pending = self._steps.next_plan, self._steps.oldest_id
        for request_id, (request, last_step) in list(pending_free.items()):
            is_copied = request_id in self._migration.copying or request_id in self._swaps.copying
            is_copied = is_copied or request_id in self._table.pinned
            if last_step < oldest_pending and not is_copied:
                still_shared = self._kv.release(request, unannounced=next_plan.drop(request))
                next_plan.add_blocks(request, still_shared)
                self._kv.forget(request)
                del pending_free[request_id]

    # --- self-check ---

    def check_integrity(self) -> None:
        """Check that each running request is in exactly one phase, and that exactly the running ones hold blocks."""
        table = self._table
        sending = [i for i, t in self._migration.transfers.items() if t.state is TransferState.SENDING]
        decoding = [request.request_id for request in self._decodes.requests]
        in_phase = [*table.prefilling, *table.prefilled, *sending, *decoding]
        assert len(set(in_phase)) == len(in_phase), "a request is in two phases"
        running = table.running.keys()
        missing = running ^ (set(in_phase) - table.pending_free.keys())
        assert not missing, f"running requests in no phase: {missing}"
        assert not any(i in running for i in table.pending_free), "an ended request still runs"
        assert not any(request.request_id in running for request in table.waiting), "a request waits and runs"
        waiting_preempted = {r.request_id for r in table.waiting if r.status is RequestStatus.PREEMPTED}
        assert table.preempted.keys() == waiting_preempted, "a preempted request does not wait"
        swapping = [i for i in table.preempted if self._kv.decode.holds(i)]
        assert all(self._kv.decode.is_in_transfer(i) for i in swapping), "a waiting request holds blocks"
        self._decodes.check_integrity()
        self._kv.check_integrity([*running, *table.pending_free, *swapping, *table.reserved, *table.borrowed])
