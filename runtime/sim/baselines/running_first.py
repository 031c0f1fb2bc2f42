"""Running-first policy: the decisions of vLLM's v1 scheduler, for comparisons and simulations.

It has one token budget per step instead of phases: running requests are served first, in order, then waiting requests
are admitted while the budget and `max_num_seqs` allow. `PDScheduler` differs: it bounds waits, admits a preempted
request only when the others can still grow, reserves a part of a hybrid step for prefill, and shares blocks only once
they are computed. This policy is not meant for serving: a block that is shared before it is computed has wrong content
if its owner is preempted in the same step.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sageLLM.runtime.scheduler.base import BaseScheduler
from sageLLM.runtime.scheduler.batch import Batch, Chunk, KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.policy import ByPriority, FirstCome
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.sim.baselines.running_first_blocks import SharedBlockPool


@dataclass(frozen=True, slots=True)
class RunningFirstConfig:
    """Settings, with vLLM's names.

    - `max_num_batched_tokens` is the token budget of a step, `max_num_seqs` bounds the running requests.
    - `long_prefill_token_threshold` (0: none) caps the tokens of one request in a step.
    - Without `enable_chunked_prefill` a prompt that exceeds the rest of the budget waits, and so do those after it.
    - `policy`: "fcfs", or "priority" (lowest `Request.priority` first, then earliest arrival).
    - `full_sequence_must_fit`: admit a request only if blocks are free for all its known tokens, not just for its first
      chunk.
    - `async_scheduling`: while a step is pending, plan its requests further, with the tokens that it will produce.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    full_sequence_must_fit: bool = False
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_num_seqs", 1), ("max_num_batched_tokens", 1), ("long_prefill_token_threshold", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.policy not in ("fcfs", "priority"):
            raise ValueError(f"policy must be one of fcfs, priority; got {self.policy!r}")


@dataclass(slots=True)
class _Step:
    """Step being planned. `num_coming` counts the tokens by request that pending steps will produce."""

    budget: int
    num_coming: Mapping[str, int]
    chunks: dict[str, Chunk] = field(default_factory=dict)
    new_blocks: dict[str, list[int]] = field(default_factory=dict)
    num_cached: dict[str, int] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)

    def length(self, request: Request) -> int:
        """The tokens of the request once the pending steps have ended."""
        return request.total_tokens + self.num_coming.get(request.request_id, 0)

    def add(self, request: Request, num_tokens: int, new_blocks: list[int]) -> None:
        start = request.num_planned_tokens
        end = start + num_tokens
        self.chunks[request.request_id] = Chunk(request, start, num_tokens, end == self.length(request))
        self.budget -= num_tokens
        if new_blocks:
            self.new_blocks[request.request_id] = new_blocks

    def drop(self, request: Request) -> bool:
        """Remove a victim and return its tokens to the budget. True if it was in the step."""
        chunk = self.chunks.pop(request.request_id, None)
        self.new_blocks.pop(request.request_id, None)
        if chunk is None:
            return False
        self.budget += chunk.num_tokens
        return True


@dataclass(slots=True)
class _PendingStep:
    """A step handed out and not committed; `void` holds the ids preempted since then."""

    output: ScheduleOutput
    void: set[str] = field(default_factory=set)

    @property
    def chunks(self) -> list[Chunk]:
        return [
            chunk for batch in (self.output.prefill_batch, self.output.decode_batch) if batch for chunk in batch.chunks
        ]


class RunningFirstScheduler(BaseScheduler):
    """Schedules as vLLM's v1 scheduler does, over `kv_budget.num_blocks` blocks.

    (vLLM keeps one block of its pool for padding; a recording of it with N blocks is N - 1 blocks here.)

    1. RUNNING requests, in order of admission, get min(remaining tokens, budget). If no block is free for one, the last
       running request (under "priority" the one with the largest (priority, arrival)) is preempted: its blocks are
       freed, it moves to the front of the waiting queue (under "priority" to its rank), and its tokens of this step
       return to the budget. This repeats until the block is free or the request itself is the victim, which ends the
       phase.
    2. WAITING requests are visited only if this step preempts none, while budget and `max_num_seqs` allow. A prefix of
       cached blocks counts as computed: a multiple of the block size, at most all tokens but one. A head that does not
       fit blocks the queue.

    `schedule` counts the tokens as planned at once, so it may be called again before `update_after_step`, which
    commits the oldest step. A request whose newest token a pending step computes is not in the next step, unless
    `async_scheduling` is set; then only one that ends with it is not. A token that arrives for a request preempted
    since then is kept.
    """

    def __init__(
        self,
        config: RunningFirstConfig | None = None,
        *,
        kv_budget: KVBudget,
        max_model_len: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config or RunningFirstConfig()
        policy = ByPriority() if self.config.policy == "priority" else FirstCome()
        super().__init__(self.config.max_num_seqs, self.config.max_num_batched_tokens, policy)
        self.kv = SharedBlockPool(kv_budget.num_blocks, kv_budget.block_size, self.config.enable_prefix_caching)
        max_kv_tokens = kv_budget.num_blocks * kv_budget.block_size
        self.limits = SequenceLimits(max_model_len, max_kv_tokens, kv_budget.block_size)
        self._clock = clock
        self._pending: deque[_PendingStep] = deque()
        self._freed: list[int] = []
        self._ended: list[Request] = []
        self._num_steps = 0
        self._totals = dict.fromkeys(("total_prefill_batches", "total_decode_batches", "total_preemptions"), 0)

    def why_not_acceptable(self, request: Request) -> str | None:
        """The reason why `add_request` would refuse, or None."""
        reason = super().why_not_acceptable(request) or self.limits.why_too_long(request)
        budget = self.config.max_num_batched_tokens
        is_whole = not self.config.enable_chunked_prefill
        if reason is None and is_whole and self._num_tokens(request.total_tokens, 0) > budget:
            return (
                f"request {request.request_id!r} has {request.total_tokens} prompt tokens; without chunked prefill at "
                f"most max_num_batched_tokens={budget} can be computed"
            )
        return reason

    def abort_request(self, request_id: str) -> bool:
        """End a request; if it is in a pending step its blocks are freed when that step ends."""
        request = self.running_requests.get(request_id) or self.waiting_queue.get(request_id)
        if request is None:
            return False
        self._retire(request)
        return True

    # --- planning ---

    def schedule(self) -> ScheduleOutput:
        """Plan the next step."""
        step = _Step(self.config.max_num_batched_tokens, self._num_coming())
        self._serve_running(step)
        if not step.preempted:
            self._admit_waiting(step)
        for chunk in step.chunks.values():
            chunk.request.plan_up_to(chunk.start + chunk.num_tokens)
        output = self._output(step)
        self._pending.append(_PendingStep(output))
        self._num_steps += 1
        return output

    def _num_coming(self) -> Mapping[str, int]:
        if not self.config.async_scheduling:
            return {}
        return Counter(
            chunk.request.request_id
            for pending in self._pending
            for chunk in pending.chunks
            if chunk.is_last and chunk.request.request_id not in pending.void
        )

    def _serve_running(self, step: _Step) -> None:
        for request in list(self.running_requests.values()):
            if step.budget <= 0:
                return
            if request.request_id not in self.running_requests:  # a victim
                continue
            length = step.length(request)
            num_tokens = min(self._num_tokens(length, request.num_planned_tokens), step.budget)
            if num_tokens <= 0 or self._ends_before(length, request):
                continue
            if not self._make_room(request, request.num_planned_tokens + num_tokens, step):
                return
            new_blocks = self.kv.extend(request, (), request.num_planned_tokens + num_tokens)
            step.add(request, num_tokens, new_blocks)

    def _make_room(self, request: Request, num_tokens: int, step: _Step) -> bool:
        """Preempt until enough blocks are free for the request; False if it became a victim itself."""
        while self.kv.num_needed(request.kv_block_ids, (), num_tokens) > self.kv.num_free:
            victim = self._victim()
            self._preempt(victim, step)
            if victim is request:
                return False
        return True

    def _victim(self) -> Request:
        running = self.running_requests
        if self.config.policy == "priority":
            return max(running.values(), key=lambda request: (request.priority, request.sequence_number))
        return running[next(reversed(running))]

    def _preempt(self, request: Request, step: _Step) -> None:
        step.drop(request)
        step.preempted.append(request)
        del self.running_requests[request.request_id]
        for pending in self._pending:
            pending.void.add(request.request_id)
        self._freed += self.kv.release(request)
        request.forget_progress()
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._totals["total_preemptions"] += 1
        if self.config.policy == "fcfs":  # before all others, the latest victim first
            request.rank = (-1, -self._totals["total_preemptions"])
        self.preempted_requests[request.request_id] = request
        self.waiting_queue.push(request)

    def _admit_waiting(self, step: _Step) -> None:
        while step.budget > 0 and len(self.running_requests) < self.config.max_num_seqs:
            request = self.waiting_queue.peek()
            if request is None or not self._admit(request, step):
                return

    def _admit(self, request: Request, step: _Step) -> bool:
        hits = self.kv.find_prefix(request)
        num_cached = len(hits) * self.kv.block_size
        num_tokens = self._num_tokens(request.total_tokens, num_cached)
        if not self.config.enable_chunked_prefill and num_tokens > step.budget:
            return False
        num_tokens = min(num_tokens, step.budget)
        must_fit = request.total_tokens if self.config.full_sequence_must_fit else num_cached + num_tokens
        if self.kv.num_needed((), hits, must_fit) > self.kv.num_free:
            return False
        self.waiting_queue.remove(request)
        self.preempted_requests.pop(request.request_id, None)
        new_blocks = self.kv.extend(request, hits, num_cached + num_tokens)
        self.running_requests[request.request_id] = request
        request.status = RequestStatus.PREFILLING
        request.compute_up_to(num_cached)
        request.plan_up_to(num_cached)
        step.num_cached[request.request_id] = num_cached
        step.add(request, num_tokens, new_blocks)
        return True

    def _ends_before(self, length: int, request: Request) -> bool:
        """Whether the request ends by length with a pending step, after which it will have `length` tokens."""
        num_coming = length - request.total_tokens
        return num_coming > 0 and self.limits.num_outputs_left(request) <= num_coming

    def _num_tokens(self, length: int, num_planned: int) -> int:
        num_tokens = length - num_planned
        threshold = self.config.long_prefill_token_threshold
        return min(num_tokens, threshold) if threshold else num_tokens

    def _output(self, step: _Step) -> ScheduleOutput:
        decodes = [chunk for chunk in step.chunks.values() if _is_decode(chunk)]
        ids = {chunk.request.request_id for chunk in decodes}
        prefills = [chunk for chunk in step.chunks.values() if chunk.request.request_id not in ids]
        freed, self._freed = self._freed, []
        self._totals["total_prefill_batches"] += bool(prefills)
        self._totals["total_decode_batches"] += bool(decodes)
        return ScheduleOutput(
            prefill_batch=_batch(2 * self._num_steps, prefills),
            decode_batch=_batch(2 * self._num_steps + 1, decodes),
            preempted_requests=step.preempted,
            kv_blocks_to_allocate=step.new_blocks,
            kv_blocks_to_free=freed,
            step_id=self._num_steps,
            num_cached_tokens=step.num_cached,
        )

    # --- committing ---

    def update_after_step(
        self,
        finished_request_ids: Iterable[str],
        pending_migrations: Collection[str] = (),
        step_id: int | None = None,
    ) -> list[str]:
        """Commit the pending step of this id (default: the oldest); returns the ids that the scheduler itself ended."""
        ended: list[Request] = []
        if self._pending:
            ended = self._commit(self._take_pending(step_id))
        for request_id in finished_request_ids:
            request = self.running_requests.get(request_id) or self.waiting_queue.get(request_id)
            if request is not None:
                self._retire(request)
        unexpected = [request for request in ended if request.status is not RequestStatus.FINISHED]
        for request in unexpected:
            self._retire(request)
        self._free_ended()
        return [request.request_id for request in unexpected]

    def _take_pending(self, step_id: int | None) -> _PendingStep:
        if step_id is None:
            return self._pending.popleft()
        step = next(pending for pending in self._pending if pending.output.step_id == step_id)
        self._pending.remove(step)
        return step

    def _commit(self, step: _PendingStep) -> list[Request]:
        now = self._clock()
        last: list[Request] = []
        for chunk in step.chunks:
            request = chunk.request
            if chunk.is_last and request.first_token_time is None:
                request.first_token_time = now
            if request.status is RequestStatus.FINISHED or request.request_id in step.void:
                continue
            request.compute_up_to(chunk.start + chunk.num_tokens)
            if chunk.is_last:
                request.status = RequestStatus.DECODING
                last.append(request)
        return [request for request in last if self.limits.is_complete(request)]

    def _retire(self, request: Request) -> None:
        if request.request_id in self.waiting_queue:
            self.waiting_queue.remove(request)
            self.preempted_requests.pop(request.request_id, None)
        else:
            del self.running_requests[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_time = self._clock()
        self._ended.append(request)
        if not self._pending:
            self._free_ended()

    def _free_ended(self) -> None:
        """Free the blocks of ended requests that are in no pending step."""
        if not self._ended:
            return
        in_steps = {chunk.request for step in self._pending for chunk in step.chunks}
        for request in self._ended:
            if request not in in_steps:
                self._freed += self.kv.release(request)
                self.kv.forget(request)
        self._ended = [request for request in self._ended if request in in_steps]

    # --- reports ---

    def get_stats(self) -> dict[str, int]:
        """Counters (`total_*`) and current sizes, with the names of `PDScheduler`."""
        decoding = sum(r.status is RequestStatus.DECODING for r in self.running_requests.values())
        return self._totals | {
            "total_steps": self._num_steps,
            "prefill_queue_size": len(self.waiting_queue) + len(self.running_requests) - decoding,
            "decode_queue_size": decoding,
            "num_waiting": len(self.waiting_queue),
            "num_running": len(self.running_requests),
            "num_preempted": len(self.preempted_requests),
            "kv_blocks_used": self.kv.num_blocks - self.kv.num_free,
        }

    def check_integrity(self) -> None:
        """Check that blocks and requests agree."""
        held = [*self.running_requests.values(), *self._ended]
        self.kv.check_integrity(held)
        assert not any(r.request_id in self.running_requests for r in self.waiting_queue), "a request waits and runs"


def _is_decode(chunk: Chunk) -> bool:
    has_token = chunk.request.output_token_ids or chunk.start >= chunk.request.num_prompt_tokens
    return bool(has_token) and chunk.is_last and chunk.num_tokens == 1


def _batch(batch_id: int, chunks: list[Chunk]) -> Batch | None:
    return Batch(batch_id, [chunk.request for chunk in chunks], chunks) if chunks else None
