"""Types of a step as the engine sees it: chunks, batches, KV copies, and the output of `schedule`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sageLLM.runtime.kv.copies import BlockCopy, TierCopy
from sageLLM.runtime.scheduler.request import Request

Stage = Literal["prefill", "decode", "hybrid", "idle"]


@dataclass(slots=True)
class Chunk:
    """Part of a request that a step computes: tokens `start .. start + num_tokens - 1` of prompt + output.

    `is_last`: the logits of the chunk's last token yield the request's next token.
    """

    request: Request
    start: int
    num_tokens: int
    is_last: bool


class Batch:
    """Requests that one phase computes in one step, with one chunk each, in the same order.

    A batch constructed without chunks computes all remaining tokens of its requests.
    """

    __slots__ = ("_chunks", "batch_id", "requests")

    def __init__(self, batch_id: int, requests: list[Request], chunks: list[Chunk] | None = None) -> None:
        self.batch_id = batch_id
        self.requests = requests
        self._chunks = chunks

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.batch_id}, {self.chunks})"

    @property
    def chunks(self) -> list[Chunk]:
        if self._chunks is None:
            self._chunks = self._make_chunks()
        return self._chunks

    @property
    def batch_size(self) -> int:
        return len(self.requests)

    @property
    def total_tokens(self) -> int:
        """Tokens that this step computes, not the context lengths."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    def _make_chunks(self) -> list[Chunk]:
        return [_remaining(request) for request in self.requests]


def _remaining(request: Request) -> Chunk:
    start = request.num_computed_tokens
    return Chunk(request, start, request.total_tokens - start, is_last=True)


class DecodeStepBatch(Batch):
    """One token of each request. Request i starts at `offsets[i] + tick`; chunks are built when they are read.

    A steady decode step shares `requests` and `offsets` with the step before; neither list is ever modified in place.
    """

    __slots__ = ("offsets", "tick")

    def __init__(self, batch_id: int, requests: list[Request], offsets: list[int], tick: int) -> None:
        super().__init__(batch_id, requests)
        self.offsets = offsets
        self.tick = tick

    @property
    def total_tokens(self) -> int:
        return len(self.requests)

    def _make_chunks(self) -> list[Chunk]:
        tick = self.tick
        pairs = zip(self.requests, self.offsets, strict=True)
        return [Chunk(request, offset + tick, 1, True) for request, offset in pairs]


@dataclass(frozen=True, slots=True)
class KVMigration:
    """Copy of `num_tokens` tokens of KV from `source_blocks` of the prefill pool to `target_blocks` of the decode pool.

    Both lists have the same length: block i goes to block i. The tokens are `start .. start + num_tokens - 1` of the
    request; `start` is a multiple of the block size. `attempt` is an epoch: it distinguishes the copy from an earlier,
    lost one of the same tokens, and every acknowledgement names it.
    """

    request_id: str
    source_blocks: Sequence[int]
    target_blocks: Sequence[int]
    num_tokens: int
    start: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Size of the KV cache: `num_blocks` blocks of `block_size` tokens in each pool.

    Strict mode has two pools; `num_prefill_blocks` sizes the prefill worker's pool where it differs from the decode
    worker's. The worker that decodes has `num_lower_blocks` further blocks in a tier below the device, for running
    requests. `num_host_blocks` and `num_disk_blocks` size the tiers for victims of `preemption_mode="swap"`.
    """

    num_blocks: int
    block_size: int = 16
    num_prefill_blocks: int | None = None
    num_lower_blocks: int = 0
    num_host_blocks: int = 0
    num_disk_blocks: int = 0


@dataclass(slots=True)
class ScheduleOutput:
    """Work of the engine in one step.

    Blocks: apply `kv_blocks_to_free` (returned to the pool since the last output) before `kv_blocks_to_allocate` (new
    in this step, by request): a block may be in both. A request's whole table is `request.kv_block_ids`. In strict
    mode both fields refer to the pool of the worker that the request runs on, which is the decode pool once it
    migrates, and `prefill_blocks_to_free` holds the blocks returned to the prefill pool.

    `num_cached_tokens` maps each request admitted in this step to its number of leading tokens found in the prefix
    cache; they are not computed.

    `requeued_requests` lost their KV since the last step, because they have outgrown it (`SequenceLimits.switch_len`),
    or because it could not be transferred; unlike preempted ones they may be in this step again.

    `block_copies`, then `tier_copies`, run before everything else of the step. A preempted request is swapped if a
    copy takes its KV from the device, otherwise it is recomputed. A copy between tiers counts as done when the step is
    committed; report failed ones with `fail_swaps`.

    `kv_migrations` neither write a block that the step's batches touch nor read one that they write, so copies and
    batches may run in any order or concurrently. `migrations_to_cancel` were handed out earlier and not acknowledged in
    time; once they are known to have stopped, report them with `fail_migrations` (or with `confirm_migrations` if they
    arrived after all).
    """

    prefill_batch: Batch | None = None
    decode_batch: Batch | None = None
    preempted_requests: list[Request] = field(default_factory=list)
    kv_blocks_to_allocate: dict[str, list[int]] = field(default_factory=dict)
    kv_blocks_to_free: list[int] = field(default_factory=list)
    kv_migrations: list[KVMigration] = field(default_factory=list)
    prefill_blocks_to_free: list[int] = field(default_factory=list)
    step_id: int = 0
    num_cached_tokens: dict[str, int] = field(default_factory=dict)
    migrations_to_cancel: list[KVMigration] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)
    tier_copies: list[TierCopy] = field(default_factory=list)
    requeued_requests: list[Request] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        """The batches that are present; both is "hybrid", although in strict mode they run on different workers."""
        if self.prefill_batch and self.decode_batch:
            return "hybrid"
        if self.prefill_batch:
            return "prefill"
        return "decode" if self.decode_batch else "idle"

    @property
    def is_empty(self) -> bool:
        """Whether the engine has nothing to run or copy."""
        has_batch = self.prefill_batch or self.decode_batch
        has_copy = self.kv_migrations or self.migrations_to_cancel or self.tier_copies or self.block_copies
        return not (has_batch or has_copy)

    @property
    def swapped_requests(self) -> list[Request]:
        """The preempted requests with KV kept in a tier."""
        swapped = {copy.seq_id for copy in self.tier_copies if copy.source == "device"}
        return [request for request in self.preempted_requests if request.request_id in swapped]

    @property
    def num_scheduled_tokens(self) -> dict[str, int]:
        """Tokens that this step computes, by request."""
        batches = [batch for batch in (self.prefill_batch, self.decode_batch) if batch]
        return {chunk.request.request_id: chunk.num_tokens for batch in batches for chunk in batch.chunks}
