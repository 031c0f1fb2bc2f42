"""The step being planned. Until it is handed out a request can be dropped from it, which gives its share back."""

from dataclasses import dataclass, field

from sageLLM.runtime.scheduler.base import Batch, Chunk, KVMigration, Request, ScheduleOutput


@dataclass(slots=True)
class StepPlan:
    """What a step will hold so far: chunks by request, blocks given, requests preempted, copies.

    The phases count what the plan holds against their budgets, so whatever leaves it is budget again at once.
    """

    prefill: dict[str, Chunk] = field(default_factory=dict)
    decode: dict[str, Chunk] = field(default_factory=dict)
    given: dict[str, list[int]] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)
    migrations: list[KVMigration] = field(default_factory=list)

    def add_prefill(self, request: Request, num_tokens: int) -> None:
        """Compute the next `num_tokens` tokens of a prompt (or of a replay)."""
        start = request.num_computed_tokens
        is_last = start + num_tokens == request.total_tokens
        self.prefill[request.request_id] = Chunk(request, start, num_tokens, is_last)

    def add_decode(self, request: Request) -> None:
        """Compute a request's newest token."""
        self.decode[request.request_id] = Chunk(request, request.num_computed_tokens, 1, True)

    def give(self, request: Request, blocks: list[int]) -> None:
        """Note blocks that the request was given within this step."""
        if blocks:
            self.given.setdefault(request.request_id, []).extend(blocks)

    def drop(self, request: Request) -> list[int]:
        """Take a request out of the step; returns the blocks that it was given within it."""
        self.prefill.pop(request.request_id, None)
        self.decode.pop(request.request_id, None)
        return self.given.pop(request.request_id, [])

    def to_output(self, step_id: int) -> ScheduleOutput:
        """The finished plan as the engine sees it."""
        return ScheduleOutput(
            prefill_batch=_batch(2 * step_id, self.prefill),
            decode_batch=_batch(2 * step_id + 1, self.decode),
            preempted_requests=self.preempted,
            kv_blocks_to_allocate=self.given,
            kv_migrations=self.migrations,
            step_id=step_id,
        )


def _batch(batch_id: int, chunks_by_id: dict[str, Chunk]) -> Batch | None:
    if not chunks_by_id:
        return None
    chunks = list(chunks_by_id.values())
    return Batch(batch_id, [chunk.request for chunk in chunks], chunks)
