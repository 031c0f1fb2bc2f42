"""Requests, batches, and what every scheduler promises: the vocabulary shared with engine, KV runtime and metrics.

One step is: `out = scheduler.schedule()`; the engine runs the batches and copies of `out` and appends one sampled
token to each request whose chunk `is_last`; `scheduler.update_after_step(finished_ids)` commits the step.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from sageLLM.runtime.scheduler.queues import RankedQueue

Rank = tuple[int, int]
Stage = Literal["prefill", "decode", "hybrid", "idle"]


class RequestStatus(Enum):
    """Where a request stands; FINISHED covers aborted ones too."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One sequence to be completed. Compared by identity; the scheduler changes it in place.

    `top_k=-1` means no top-k limit. Times are seconds of the scheduler's clock. `num_computed_tokens` counts the
    leading tokens of prompt + output whose KV is in the cache; a decoding request's newest token is not among them.
    `sequence_number` is its place in the order of arrival, given by `add_request`.
    """

    request_id: str
    prompt_token_ids: list[int]
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    arrival_time: float = field(default_factory=time.time)
    first_token_time: float | None = None
    finish_time: float | None = None
    kv_block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    priority: int = 0
    num_preemptions: int = 0
    sequence_number: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def rank(self) -> Rank:
        """The lower rank is served first: a lower `priority`, then the earlier arrival."""
        return (self.priority, self.sequence_number)


@dataclass(slots=True)
class Chunk:
    """The part of one request that a step computes: tokens `start .. start + num_tokens - 1` of prompt + output.

    `is_last`: the logits of the chunk's last token yield the request's next token.
    """

    request: Request
    start: int
    num_tokens: int
    is_last: bool


@dataclass(slots=True)
class Batch:
    """The requests that one phase computes in one step, with the chunk of each, in the same order.

    A batch made without chunks computes all that its requests still lack.
    """

    batch_id: int
    requests: list[Request]
    chunks: list[Chunk] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.chunks:
            self.chunks = [_whole_rest(request) for request in self.requests]

    @property
    def batch_size(self) -> int:
        return len(self.requests)

    @property
    def total_tokens(self) -> int:
        """Tokens that this step computes, not the lengths of the contexts."""
        return sum(chunk.num_tokens for chunk in self.chunks)


def _whole_rest(request: Request) -> Chunk:
    start = request.num_computed_tokens
    return Chunk(request, start, request.total_tokens - start, is_last=True)


@dataclass(frozen=True, slots=True)
class KVMigration:
    """Copy the KV of `num_tokens` tokens from `source_blocks` of the prefill pool to `target_blocks` of the decode
    pool.

    The two lists have one length: block i goes to block i.
    """

    request_id: str
    source_blocks: list[int]
    target_blocks: list[int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class KVBudget:
    """The size of the KV cache: `num_blocks` blocks of `block_size` tokens, in each pool.

    Strict mode has two pools; `num_prefill_blocks` sizes the prefill worker's one where it differs from the decode
    worker's.
    """

    num_blocks: int
    block_size: int = 16
    num_prefill_blocks: int | None = None


@dataclass(slots=True)
class ScheduleOutput:
    """What the engine does in one step.

    Blocks: apply `kv_blocks_to_free` (returned to the pool since the last output) before `kv_blocks_to_allocate` (new
    in this step, by request): a block may be in both. A request's whole table is `request.kv_block_ids`. In strict
    mode both fields speak of the pool of the worker that the request runs on, the decode pool once it migrates, and
    `prefill_blocks_to_free` holds the blocks returned to the prefill pool.

    `kv_migrations` touch no block that the step's batches touch: copies and batches may run in any order or at once.
    """

    prefill_batch: Batch | None = None
    decode_batch: Batch | None = None
    preempted_requests: list[Request] = field(default_factory=list)
    kv_blocks_to_allocate: dict[str, list[int]] = field(default_factory=dict)
    kv_blocks_to_free: list[int] = field(default_factory=list)
    kv_migrations: list[KVMigration] = field(default_factory=list)
    prefill_blocks_to_free: list[int] = field(default_factory=list)
    step_id: int = 0

    @property
    def stage(self) -> Stage:
        """Which batches are there; both is "hybrid", though in strict mode the two run on workers of their own."""
        if self.prefill_batch and self.decode_batch:
            return "hybrid"
        if self.prefill_batch:
            return "prefill"
        return "decode" if self.decode_batch else "idle"

    @property
    def is_empty(self) -> bool:
        """Whether the engine has nothing to run or copy."""
        return not (self.prefill_batch or self.decode_batch or self.kv_migrations)


class BaseScheduler(ABC):
    """A scheduler of at most `max_batch_size` running requests and `max_tokens` tokens a step.

    `waiting_queue` holds those without KV (new or preempted) by rank, `running_requests` those with KV by id, and
    `preempted_requests` the part of the waiting ones that lost their KV, by id.
    """

    def __init__(self, max_batch_size: int = 256, max_tokens: int = 8192) -> None:
        self.max_batch_size = max_batch_size
        self.max_tokens = max_tokens
        self.waiting_queue: RankedQueue[Request] = RankedQueue()
        self.running_requests: dict[str, Request] = {}
        self.preempted_requests: dict[str, Request] = {}
        self._num_arrivals = 0

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it is empty, was used before, has a live one's id, or can never run."""
        reason = self.why_not_acceptable(request)
        if reason is not None:
            raise ValueError(reason)
        request.sequence_number = self._num_arrivals
        self._num_arrivals += 1
        self.waiting_queue.push(request)

    def why_not_acceptable(self, request: Request) -> str | None:
        """The reason why `add_request` would refuse, or None."""
        name = f"request {request.request_id!r}"
        if request.request_id in self.waiting_queue or request.request_id in self.running_requests:
            return f"{name} is already being served; ids of live requests must differ"
        if not request.prompt_token_ids:
            return f"{name} has an empty prompt; it needs at least one token"
        if request.max_new_tokens < 1:
            return f"{name} asks for max_new_tokens={request.max_new_tokens}; it must be at least 1"
        if request.status is not RequestStatus.WAITING:
            return f"{name} is {request.status.value}; make a new Request to run it again"
        return None

    @abstractmethod
    def abort_request(self, request_id: str) -> bool:
        """End a request in whatever state it is; False when no live request has this id."""

    @abstractmethod
    def schedule(self) -> ScheduleOutput:
        """Plan the next step. Nothing counts as computed until `update_after_step`."""

    @abstractmethod
    def update_after_step(
        self, finished_request_ids: Iterable[str], pending_migrations: Collection[str] = ()
    ) -> list[str]:
        """Commit the planned step, end the finished requests, and return the ids that the scheduler itself ended."""

    def get_num_waiting(self) -> int:
        """Requests without KV: new ones and preempted ones."""
        return len(self.waiting_queue)

    def get_num_running(self) -> int:
        """Requests that hold KV."""
        return len(self.running_requests)
