"""Handover of requests and of KV between the schedulers of a group of workers (`DisaggregatedScheduler`).

A request is on one scheduler at a time. Its KV is copied from the blocks of the one that prefills to blocks that the
one that decodes has reserved; it changes over when the copy is complete.
"""

from collections.abc import Sequence

from sageLLM.runtime.kv.hash_chain import HashChain
from sageLLM.runtime.scheduler.lifecycle import Lifecycle
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.state import SchedulerState

HEADROOM_STEPS = 16
"""A reservation leaves the blocks that the running decodes need in so many steps."""


class Handover:
    """The side of one scheduler in the handover of requests, and of prefixes in the cache."""

    def __init__(self, state: SchedulerState, lifecycle: Lifecycle) -> None:
        self._max_batch_size = state.max_batch_size
        self._policy, self._limits, self._kv = state.policy, state.limits, state.kv
        self._table, self._steps, self._decodes = state.table, state.steps, state.decodes
        self._lifecycle = lifecycle
        self._newest_step: dict[str, int] = {}

    # --- the worker that decodes ---

    def num_cached_tokens(self, chain: HashChain) -> int:
        """The number of leading tokens of a sequence with KV here, in full blocks of the chain's size."""
        return self._kv.decode.num_matching_tokens(chain)

    @property
    def num_reserved(self) -> int:
        """The number of requests that are expected."""
        return len(self._table.reserved)

    @property
    def is_drained(self) -> bool:
        """Whether no request has blocks here and no step is pending."""
        table = self._table
        return not (table.running or table.waiting or table.reserved or table.pending_free or self._steps.pending)

    def reserve(self, request: Request) -> int | None:
        """Reserve blocks for the request's tokens; returns the number of them with KV here, or None without room."""
        table, kv = self._table, self._kv.decode
        num_tokens = self._limits.num_tokens_reserved(request)
        headroom = self._decodes.num_blocks_due(HEADROOM_STEPS)
        self._kv.track(request)
        has_slot = len(table.running) + len(table.reserved) < self._max_batch_size
        if not has_slot or not kv.can_admit(request.request_id, num_tokens, headroom):
            self._kv.forget(request)
            return None
        table.reserved[request.request_id] = request
        self._newest_step[request.request_id] = self._steps.num_planned - 1
        return kv.admit(request.request_id, num_tokens).num_cached_tokens

    def is_ready(self, request_id: str) -> bool:
        """Whether a copy may write to the reserved blocks.

        A pending step still decodes a request that was preempted after it was planned, in blocks that are free now.
        """
        return self._newest_step[request_id] < self._steps.oldest_id

    def blocks_of(self, request_id: str) -> list[int]:
        """The blocks of a request, or of a borrowed table."""
        return self._kv.decode.block_table(request_id)

    def cancel(self, request_id: str) -> None:
        """Free reserved blocks that no copy writes to."""
        request = self._end_reservation(request_id)
        self._kv.freed += self._kv.decode.free(request_id)
        self._kv.forget(request)

    def start(self, request_id: str, num_computed_tokens: int) -> None:
        """The KV of these tokens has arrived, and the request is not on its former scheduler any more: it decodes."""
        request = self._end_reservation(request_id)
        request.rank = self._policy.rank(request)
        request.kv_block_ids = self._kv.decode.block_table(request_id)
        request.compute_up_to(num_computed_tokens)
        request.plan_up_to(num_computed_tokens)
        self._lifecycle.run(request)
        self._kv.publish(request)
        self._lifecycle.start_decoding(request)
        self._lifecycle.requeue_outgrown()

    def _end_reservation(self, request_id: str) -> Request:
        del self._newest_step[request_id]
        return self._table.reserved.pop(request_id)

    def stranded(self) -> list[Request]:
        """Waiting requests that this worker does not compute, and no pending step either."""
        kv = self._kv.decode
        return [
            request
            for request in self._table.waiting
            if not (kv.is_swapped(request.request_id) or kv.is_in_transfer(request.request_id))
            and not self._steps.has_void_work(request)
        ]

    # --- the worker that prefills ---

    def prefilling(self) -> list[Request]:
        """The requests with blocks here whose prefill has begun, by rank."""
        requests = [*self._table.prefilling.values(), *self._table.prefilled.values()]
        return sorted(requests, key=lambda request: request.rank)

    def is_prefilled(self, request: Request) -> bool:
        """Whether all tokens with KV are computed, and kept until the handover."""
        return request.request_id in self._table.prefilled

    def pin(self, request_id: str) -> None:
        """A copy reads the blocks of the request: they stay until `unpin`, also if the request ends."""
        self._table.pinned.add(request_id)

    def unpin(self, request_id: str) -> None:
        """No copy reads the blocks of the request any more."""
        self._table.pinned.discard(request_id)
        if not self._steps.pending:
            self._lifecycle.free_ended()

    def hand_over(self, request: Request) -> None:
        """Let a prefilled request leave; its full blocks stay in the prefix cache."""
        self._lifecycle.leave(request)
        self._kv.release(request)
        self._kv.forget(request)

    def recompute(self, request: Request) -> None:
        """Let a prefilled request wait to be computed again; the worker must replace its block table."""
        self._lifecycle.requeue_between_steps(request)
        self._steps.next_plan.requeued.append(request)

    def withdraw(self, request: Request) -> None:
        """Let a waiting request without KV leave; another scheduler accepts it as a new one."""
        self._table.waiting.remove(request)
        self._table.preempted.pop(request.request_id, None)
        self._lifecycle.end_service(request)
        self._kv.forget(request)
        request.status = RequestStatus.WAITING
        request.is_long = None
        request.forget_progress()

    # --- prefixes ---

    def lend(self, name: str, tokens: Sequence[int], salt: str) -> None:
        """Hold the blocks with KV of the beginning of these tokens until `end_loan`."""
        kv = self._kv.decode
        kv.track(name, tokens, (), salt)
        kv.admit(name, kv.num_cached_tokens(name))
        self._table.borrowed.add(name)

    def borrow(self, name: str, tokens: Sequence[int], salt: str, num_tokens: int | None = None) -> int | None:
        """Reserve blocks for `num_tokens` of these tokens (None: all), until `end_loan`; their KV will be copied here.

        Returns the number of leading tokens with KV here, or None without room.
        """
        kv, num = self._kv.decode, len(tokens) if num_tokens is None else num_tokens
        kv.track(name, tokens, (), salt)
        if not kv.can_admit(name, num):
            kv.forget(name)
            return None
        num_cached = kv.admit(name, num).num_cached_tokens
        self._table.borrowed.add(name)
        self._newest_step[name] = self._steps.num_planned - 1
        return num_cached

    def end_loan(self, name: str, num_arrived: int = 0) -> None:
        """Free the blocks of `lend` or `borrow`; the first `num_arrived` tokens are in the prefix cache from now on."""
        kv = self._kv.decode
        self._table.borrowed.discard(name)
        self._newest_step.pop(name, None)
        if num_arrived:
            kv.publish(name, num_arrived)
        self._kv.freed += kv.free(name)
        kv.forget(name)
