"""Step being planned, and the pending step that it becomes when it is handed out."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

from sageLLM.runtime.kv.copies import BlockCopy, TierCopy
from sageLLM.runtime.scheduler.batch import Batch, Chunk, DecodeStepBatch, KVMigration, ScheduleOutput
from sageLLM.runtime.scheduler.request import DecodeSlot, Request

Role = Literal["prefill", "decode"]


@dataclass(slots=True)
class DecodePlan:
    """Decodes of a step, the slots that it skips, and, if it could not serve all, the requests served round robin."""

    batch: DecodeStepBatch
    skipped: list[DecodeSlot]
    served: list[Request] = field(default_factory=list)


@dataclass(slots=True)
class StepPlan:
    """Contents of a step so far: chunks, allocated blocks, preempted requests and copies, by request id.

    Before planning starts the plan already collects announcements for the engine: those of a step that was rolled
    back, and the blocks of forks.

    The first three fields are the context of the step. `role` is the worker that it is for (None: all workers),
    `is_ahead` says that another step is pending, and `num_consecutive_decodes` counts the decode-only steps before it.
    `num_awaiting_blocks` counts the decodes skipped for lack of a block that copies in flight will free.
    """

    role: Role | None = None
    is_ahead: bool = False
    num_consecutive_decodes: int = 0
    prefill: dict[str, Chunk] = field(default_factory=dict)
    decode: DecodePlan | None = None
    new_blocks: dict[str, list[int]] = field(default_factory=dict)
    num_cached: dict[str, int] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)
    requeued: list[Request] = field(default_factory=list)
    migrations: list[KVMigration] = field(default_factory=list)
    to_cancel: list[KVMigration] = field(default_factory=list)
    block_copies: dict[str, list[BlockCopy]] = field(default_factory=dict)
    tier_copies: dict[str, TierCopy] = field(default_factory=dict)
    num_awaiting_blocks: int = 0

    @property
    def num_decodes(self) -> int:
        return 0 if self.decode is None else len(self.decode.batch.requests)

    def add_prefill(self, request: Request, num_tokens: int) -> None:
        """Compute the next `num_tokens` tokens of a prompt (or of a recomputed sequence)."""
        start = request.num_planned_tokens
        end = start + num_tokens
        self.prefill[request.request_id] = Chunk(request, start, num_tokens, end == request.total_tokens)
        request.plan_up_to(end)

    def add_blocks(self, request: Request, blocks: list[int]) -> None:
        """Announce blocks allocated to the request."""
        if blocks:
            self.new_blocks.setdefault(request.request_id, []).extend(blocks)

    def drop(self, request: Request) -> list[int]:
        """Remove a preempted request; returns the blocks allocated to it within this step.

        Preemption happens while decodes are added, before any chunk is, so the request cannot have one yet.
        """
        self.forget(request)
        return self.new_blocks.pop(request.request_id, [])

    def forget(self, request: Request) -> None:
        """Do not announce cache hits and block copies of a request that leaves."""
        self.num_cached.pop(request.request_id, None)
        self.block_copies.pop(request.request_id, None)

    def cancel_unheard(self, running: Container[str], freed: list[int]) -> None:
        """Drop allocations of departed requests together with the matching entries of `freed`.

        The engine has heard of neither the allocation nor the release, and needs to hear of neither.
        """
        for request_id in [i for i in self.new_blocks if i not in running]:
            kept = [block for block in self.new_blocks[request_id] if not _remove_last(freed, block)]
            if kept:
                self.new_blocks[request_id] = kept
            else:
                del self.new_blocks[request_id]

    def to_output(self, step_id: int, freed: list[int], freed_prefill: list[int]) -> ScheduleOutput:
        """The finished plan as the engine sees it."""
        decode_batch = None
        if self.decode is not None:
            decode_batch = self.decode.batch
            decode_batch.batch_id = 2 * step_id + 1
        # By position: keyword arguments would double the time, and this runs in every step.
        return ScheduleOutput(
            _prefill_batch(2 * step_id, self.prefill) if self.prefill else None,
            decode_batch,
            self.preempted,
            self.new_blocks,
            freed,
            self.migrations,
            freed_prefill,
            step_id,
            self.num_cached,
            self.to_cancel,
            [copy for copies in self.block_copies.values() for copy in copies] if self.block_copies else [],
            list(self.tier_copies.values()) if self.tier_copies else [],
            self.requeued,
        )


def _prefill_batch(batch_id: int, chunks_by_id: dict[str, Chunk]) -> Batch:
    chunks = list(chunks_by_id.values())
    return Batch(batch_id, [chunk.request for chunk in chunks], chunks)


def _remove_last(blocks: list[int], block: int) -> bool:
    """Remove the last occurrence of a block; False if it is not in the list."""
    for index in range(len(blocks) - 1, -1, -1):
        if blocks[index] == block:
            del blocks[index]
            return True
    return False


@dataclass(slots=True, eq=False)
class PendingStep:
    """A step that was handed out and is neither committed nor rolled back.

    `void` holds the ids for which the step no longer counts: preempted since, or committed ahead of the step.
    `swapped` holds those of them with a token of this step among the tokens that the swap keeps.
    """

    plan: StepPlan
    output: ScheduleOutput
    void: set[str] = field(default_factory=set)
    swapped: dict[str, Request] = field(default_factory=dict)

    @property
    def step_id(self) -> int:
        return self.output.step_id

    @property
    def role(self) -> Role | None:
        return self.plan.role

    @property
    def requests(self) -> list[Request]:
        """The requests that the step computes."""
        batches = (self.output.prefill_batch, self.output.decode_batch)
        return [request for batch in batches if batch is not None for request in batch.requests]

    def computes(self, request: Request) -> bool:
        """Whether the step has a chunk of this request."""
        return request in self.requests

    @property
    def prefill_chunks(self) -> list[Chunk]:
        """The prefill chunks that still count."""
        batch = self.output.prefill_batch
        if batch is None:
            return []
        return [chunk for chunk in batch.chunks if chunk.request.request_id not in self.void]
