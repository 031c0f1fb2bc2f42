"""Recovery: rolls back steps, and requeues requests after failed copies and dead workers."""

from collections.abc import Iterable

from sageLLM.runtime.scheduler.batch import Chunk
from sageLLM.runtime.scheduler.lifecycle import Lifecycle
from sageLLM.runtime.scheduler.plan import PendingStep, Role
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.state import SchedulerState


class Recovery:
    """Restores a consistent state after a failure. Admissions and preemptions are never undone.

    An undone admission could not be repeated exactly (its blocks may be shared by then), and keeping it costs nothing:
    the next step continues from it.
    """

    def __init__(self, state: SchedulerState, lifecycle: Lifecycle) -> None:
        self._kv = state.kv
        self._table = state.table
        self._steps = state.steps
        self._decodes = state.decodes
        self._migration = state.migration
        self._swaps = state.swaps
        self._lifecycle = lifecycle

    # --- steps ---

    def roll_back(self, role: Role | None) -> None:
        """Roll back the pending steps of one worker (None: all)."""
        for step in self._steps.take_newest_first(role):
            self._roll_back(step)
        self._lifecycle.free_ended()

    def roll_back_newest(self) -> None:
        """Roll back the step planned ahead."""
        self._roll_back(self._steps.pending.pop())
        self._lifecycle.free_ended()

    def _roll_back(self, step: PendingStep) -> None:
        output = step.output
        for migration in output.kv_migrations:
            # The target blocks are announced with the first piece, so the next hand-out must announce them again.
            was_announced = output.kv_blocks_to_allocate.pop(migration.request_id, None) is not None
            self._migration.take_back(migration, was_announced)
        self._migration.renew_cancellations(output.migrations_to_cancel)
        for chunk in step.prefill_chunks:
            self._take_back(chunk)
        if step.plan.decode is not None:
            self._decodes.roll_back(step.plan.decode)
        self._steps.restore_streak(step)
        self._announce_again(step)

    def _take_back(self, chunk: Chunk) -> None:
        """Count a prefill chunk as not planned."""
        request = chunk.request
        if request.request_id not in self._table.running:
            return
        if request.slot is not None:
            self._lifecycle.stop_decoding_ahead(request)
        request.plan_up_to(chunk.start)

    def _announce_again(self, step: PendingStep) -> None:
        """Let the next step repeat the announcements of this one: the engine discards its output."""
        output, plan = step.output, self._steps.next_plan
        # Ended requests are included while their blocks are in use: the release is announced later, and the engine must
        # have heard of the allocation by then. With one pool the blocks of departed requests are repeated
        # too, as others may share them; `StepPlan.cancel_unheard` drops those that were freed.
        live = self._table.running.keys() | self._table.pending_free.keys() | self._swaps.copying.keys()
        repeated = {i: list(b) for i, b in output.kv_blocks_to_allocate.items() if i in live or not self._kv.is_split}
        for request_id, blocks in plan.new_blocks.items():
            repeated.setdefault(request_id, []).extend(blocks)
        plan.new_blocks = repeated
        plan.num_cached = {i: num for i, num in output.num_cached_tokens.items() if i in live} | plan.num_cached
        plan.block_copies = {i: c for i, c in step.plan.block_copies.items() if i in live} | plan.block_copies
        for copy in output.tier_copies:
            if self._table.find(copy.seq_id) is None and copy.seq_id not in self._table.pending_free:
                self._swaps.drop(copy.seq_id)
            else:
                plan.tier_copies[copy.seq_id] = copy
        # In front: the next output must list releases in the order in which they happened.
        self._kv.freed = output.kv_blocks_to_free + self._kv.freed
        self._kv.freed_prefill = output.prefill_blocks_to_free + self._kv.freed_prefill

    # --- copies ---

    def fail_migrations(self, request_ids: Iterable[str]) -> None:
        """Send the copies of these requests again, or recompute the requests with their attempts used up."""
        for request_id in request_ids:
            given_up = self._migration.fail(request_id)
            if given_up is not None:
                self._lifecycle.requeue(given_up.request)
        self._withdraw_superseded()
        self._lifecycle.free_ended()

    def _withdraw_superseded(self) -> None:
        """Remove superseded copies from pending steps: begun now, they would overwrite newer KV in their target."""
        transfer_of = self._migration.transfer_of
        for step in self._steps.pending:
            for pieces in (step.output.kv_migrations, step.output.migrations_to_cancel):
                pieces[:] = [p for p in pieces if transfer_of(p.request_id, p.start, p.attempt) is not None]

    def fail_swaps(self, request_ids: Iterable[str]) -> None:
        """Recompute these requests: a copy between tiers failed."""
        for request_id in request_ids:
            if request_id not in self._swaps.copying:
                continue
            self._swaps.drop(request_id)
            request = self._table.find(request_id)
            if request is not None:
                self._lifecycle.lose_swapped(request)

    # --- workers ---

    def lose_kv(self, role: Role | None) -> None:
        """Roll back the steps of a dead worker and requeue the requests with KV on it (None: on all workers)."""
        for step in self._steps.take_newest_first(role, shared=True):
            self._roll_back(step)
        for request in self._lost_requests(role):
            self._lifecycle.requeue_between_steps(request)
        if role != "prefill":
            self._lose_tiers()
        if role != "decode" or not self._kv.is_split:
            self._lose_prefix_cache()
        self._lifecycle.free_ended()

    def _lost_requests(self, role: Role | None) -> list[Request]:
        """The requests to recompute. Those with KV that was only to be sent to the dead worker are sent again."""
        lost: list[Request] = []
        if self._kv.is_split:
            if role != "decode":
                lost += self._migration.lose_source()
            if role != "prefill":
                self._migration.lose_target()
            self._withdraw_superseded()
        if role != "prefill":
            lost += self._decodes.requests
        if not self._kv.is_split:
            lost += [*self._table.prefilling.values(), *self._table.prefilled.values()]
        return lost

    def _lose_tiers(self) -> None:
        for request_id in list(self._swaps.copying):
            self._swaps.drop(request_id)
        for request in self._table.preempted.values():
            self._lifecycle.lose_swapped(request)

    def _lose_prefix_cache(self) -> None:
        """Empty the prefix cache. Ended requests must not publish their blocks to it when they are freed."""
        for request, _ in self._table.pending_free.values():
            request.forget_progress()
        self._kv.prefill.reset_prefix_cache()
