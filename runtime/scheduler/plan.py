"""The step being planned. Until it is handed out a request can be dropped from it, which gives its share back."""

from dataclasses import dataclass, field
from typing import Literal

from sageLLM.runtime.kv.copies import BlockCopy, TierCopy
from sageLLM.runtime.scheduler.batch import Batch, Chunk, DecodeStepBatch, KVMigration, ScheduleOutput
from sageLLM.runtime.scheduler.request import Request, Seat

Role = Literal["prefill", "decode"]


@dataclass(slots=True)
class DecodePlan:
    """The decodes of a step, the seats that sit it out, and, when the seats take turns, those that were served."""

    batch: DecodeStepBatch
    skipped: list[Seat]
    served_in_turn: list[Request] = field(default_factory=list)


@dataclass(slots=True)
class StepPlan:
    """What a step will hold so far: chunks by request, blocks given, requests preempted, copies.

    Before a step is planned its plan gathers what the engine must hear next: what a rolled-back step had said, and the
    blocks of forks. `num_sitting_out` counts the decodes that lack a block which copies under way will free.

    The phases count what the plan holds against their budgets, so whatever leaves it is budget again at once.
    """

    prefill: dict[str, Chunk] = field(default_factory=dict)
    decode: DecodePlan | None = None
    given: dict[str, list[int]] = field(default_factory=dict)
    num_cached: dict[str, int] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)
    migrations: list[KVMigration] = field(default_factory=list)
    to_cancel: list[KVMigration] = field(default_factory=list)
    block_copies: dict[str, list[BlockCopy]] = field(default_factory=dict)
    tier_copies: dict[str, TierCopy] = field(default_factory=dict)
    num_sitting_out: int = 0

    @property
    def num_decodes(self) -> int:
        return 0 if self.decode is None else len(self.decode.batch.requests)

    def add_prefill(self, request: Request, num_tokens: int) -> None:
        """Compute the next `num_tokens` tokens of a prompt (or of a replay)."""
        start = request.num_planned_tokens
        end = start + num_tokens
        self.prefill[request.request_id] = Chunk(request, start, num_tokens, end == request.total_tokens)
        request.plan_up_to(end)

    def give(self, request: Request, blocks: list[int]) -> None:
        """Note blocks that the request was given within this step."""
        if blocks:
            self.given.setdefault(request.request_id, []).extend(blocks)

    def drop(self, request: Request) -> list[int]:
        """Take a preempted request out of the step; returns the blocks that it was given within it.

        Decodes are filled in after all preemption, prefills after the decodes: there is no chunk to give back.
        """
        self.forget(request)
        return self.given.pop(request.request_id, [])

    def forget(self, request: Request) -> None:
        """Say nothing of what a request was to share or copy: it leaves."""
        self.num_cached.pop(request.request_id, None)
        self.block_copies.pop(request.request_id, None)

    def to_output(self, step_id: int) -> ScheduleOutput:
        """The finished plan as the engine sees it."""
        decode_batch = None
        if self.decode is not None:
            decode_batch = self.decode.batch
            decode_batch.batch_id = 2 * step_id + 1
        return ScheduleOutput(
            _prefill_batch(2 * step_id, self.prefill) if self.prefill else None,
            decode_batch,
            self.preempted,
            self.given,
            [],
            self.migrations,
            [],
            step_id,
            self.num_cached,
            self.to_cancel,
            [copy for copies in self.block_copies.values() for copy in copies] if self.block_copies else [],
            list(self.tier_copies.values()) if self.tier_copies else [],
        )


def _prefill_batch(batch_id: int, chunks_by_id: dict[str, Chunk]) -> Batch:
    chunks = list(chunks_by_id.values())
    return Batch(batch_id, [chunk.request for chunk in chunks], chunks)


@dataclass(slots=True)
class Flight:
    """A step that was handed out and neither committed nor rolled back.

    `role` is the worker's whose step it is, None if it is everybody's. `void` holds the ids whose part of it no longer
    counts: preempted since, or committed ahead of the step. `swapped` has those of them whose token will be among the
    tokens that the swap keeps.
    """

    output: ScheduleOutput
    decode: DecodePlan | None
    streak_before: int
    role: Role | None = None
    block_copies: dict[str, list[BlockCopy]] = field(default_factory=dict)
    void: set[str] = field(default_factory=set)
    swapped: dict[str, Request] = field(default_factory=dict)

    @property
    def step_id(self) -> int:
        return self.output.step_id

    def computes(self, request: Request) -> bool:
        """Whether the step has a chunk of this request."""
        batches = (self.output.prefill_batch, self.output.decode_batch)
        return any(request in batch.requests for batch in batches if batch is not None)

    @property
    def prefill_chunks(self) -> list[Chunk]:
        """The chunks of prefill that still count."""
        batch = self.output.prefill_batch
        if batch is None:
            return []
        return [chunk for chunk in batch.chunks if chunk.request.request_id not in self.void]
