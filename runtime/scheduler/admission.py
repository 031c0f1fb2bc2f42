"""Who gets KV blocks: admission, the growth of decodes, and whom they preempt."""

from collections.abc import Collection

from sageLLM.runtime.scheduler.lines import RequestLines
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.request import Request, RequestStatus


class Admission(RequestLines):
    """Gives out the blocks; the running request that ranks last is the victim when there are too few."""

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
        """Blocks to leave to the decodes: a preempted request comes back if these last until it has its next token."""
        if request.status is not RequestStatus.PREEMPTED:
            return 0
        num_chunks = -(-request.total_tokens // self.config.prefill_tokens_per_step)
        return self._decode.num_blocks_due(1 if self._is_ready(request) else num_chunks - 1)

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
        self._swapping[request.request_id] = None
        self._enter(request)
        return True

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
        self._swapping[request.request_id] = None
        self._go_back(request)
        request.kv_block_ids = []
        self._counters.total_swaps += 1
        return True
