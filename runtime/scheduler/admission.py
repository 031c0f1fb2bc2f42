"""Admission: allocates KV blocks to waiting requests, and starts them."""

from sageLLM.runtime.scheduler.lifecycle import Lifecycle
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.state import SchedulerState


class Admission:
    """Admits the head of the waiting queue when there are a batch slot and enough blocks.

    A head that does not fit is not overtaken: small requests would starve a large one.
    """

    def __init__(self, state: SchedulerState, lifecycle: Lifecycle) -> None:
        self._max_batch_size = state.max_batch_size
        self._prefill_tokens_per_step = state.config.prefill_tokens_per_step
        self._limits = state.limits
        self._kv = state.kv
        self._table = state.table
        self._steps = state.steps
        self._decodes = state.decodes
        self._migration = state.migration
        self._swaps = state.swaps
        self._counters = state.counters
        self._lifecycle = lifecycle

    def can_admit(self, request: Request) -> bool:
        """Whether a waiting request may start its prefill.

        Not while a pending step computes a chunk from before its preemption: the results of two chunks of one request
        would be confused, and the older one writes to blocks that are no longer its own.
        """
        has_slot = len(self._table.running) < self._max_batch_size
        if not has_slot or self.needs_no_prefill(request) or self._steps.has_void_work(request):
            return False
        self._kv.track_as(request, self._limits.is_long(request))  # a token may have arrived while it waits
        return self._kv.can_admit(request, self._limits.num_tokens_reserved(request), self._headroom(request))

    def _headroom(self, request: Request) -> int:
        """Blocks to leave free for the running decodes.

        A preempted request comes back only if these last until it has its next token. Otherwise the decodes would
        preempt it again before it makes progress, and its recomputation would be wasted.
        """
        if request.status is not RequestStatus.PREEMPTED:
            return 0
        num_chunks = -(-request.total_tokens // self._prefill_tokens_per_step)
        return self._decodes.num_blocks_due(1 if self.needs_no_prefill(request) else num_chunks - 1)

    def needs_no_prefill(self, request: Request) -> bool:
        """Whether the KV of a waiting request exists: received from elsewhere, or in a tier (or being copied to it)."""
        kv, request_id = self._kv.decode, request.request_id
        if request.status is not RequestStatus.PREEMPTED:
            return request_id in self._table.received
        return request_id in self._table.received or kv.is_swapped(request_id) or kv.is_in_transfer(request_id)

    def admit(self, request: Request, step: StepPlan) -> None:
        """Allocate blocks to the head of the waiting queue; its prefill starts in this step."""
        self._table.waiting.admit(request)
        self._table.prefilling[request.request_id] = request
        self._allocate(request, step)

    def admit_ready(self, step: StepPlan) -> None:
        """Admit heads of the waiting queue that need no prefill: they decode at once."""
        table = self._table
        if not (table.received or table.preempted):
            return
        while (head := table.waiting.peek()) is not None and len(table.running) < self._max_batch_size:
            if not (self._admit_received(head, step) or self._swap_in(head, step)):
                return
            self._lifecycle.start_decoding(head)

    def _admit_received(self, request: Request, step: StepPlan) -> bool:
        num_tokens = self._limits.num_tokens_reserved(request)
        if request.request_id not in self._table.received or not self._kv.can_admit(request, num_tokens, 0):
            return False
        self._table.waiting.admit(request)
        self._allocate(request, step)
        self._kv.track(request)  # only now: with cache hits the sender would write to shared blocks
        self._table.received.discard(request.request_id)
        return True

    def _swap_in(self, request: Request, step: StepPlan) -> bool:
        num_tokens = self._limits.num_tokens_reserved(request)
        if not self._kv.decode.can_swap_in(request.request_id, num_tokens, self._headroom(request)):
            return False
        self._table.waiting.admit(request)
        self._swaps.begin_in(request, step, num_tokens)
        self._lifecycle.run(request)
        return True

    def _allocate(self, request: Request, step: StepPlan) -> None:
        admission = self._kv.admit(request, self._limits.num_tokens_reserved(request))
        step.add_blocks(request, admission.taken_blocks)
        if admission.num_cached_tokens:
            self._counters.total_cached_tokens += admission.num_cached_tokens
            step.num_cached[request.request_id] = admission.num_cached_tokens
            request.compute_up_to(admission.num_cached_tokens)
            request.plan_up_to(admission.num_cached_tokens)
        self._lifecycle.run(request)
        if self._kv.is_split:
            self._migration.admit(request)
