"""Requests as the scheduler sees them: parameters, output so far, and progress in the KV cache."""

import time
from enum import Enum

Rank = tuple[float, int]


class RequestStatus(Enum):
    """State of a request; FINISHED includes aborted ones."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class DecodeClock:
    """Number of decode steps planned and committed."""

    __slots__ = ("committed", "planned")

    def __init__(self) -> None:
        self.planned = 0
        self.committed = 0


class DecodeSlot:
    """Entry of a request in the decode queue, with its token counts as offsets from the decode clock.

    Every decode step advances each slot by one token. With counts relative to one clock a step therefore costs the same
    for any number of decodes; only a slot that the step skips is touched (moved back by one).
    `computed_offset` is None while the request's prefill is planned and not committed. `growth_tick` and `end_tick` are
    the clock ticks at which the request needs a block and at which it may be complete. `number` is the order in the
    queue.
    """

    __slots__ = ("clock", "computed_offset", "end_tick", "growth_tick", "number", "planned_offset", "request")

    def __init__(self, request: "Request", clock: DecodeClock, num_planned: int, number: int) -> None:
        self.request = request
        self.clock = clock
        self.number = number
        self.planned_offset = num_planned - clock.planned
        self.computed_offset: int | None = None
        self.growth_tick = 0
        self.end_tick = 0

    @property
    def is_live(self) -> bool:
        """False once the request has left the decode queue (it may have a new slot since)."""
        return self.request.slot is self


class Request:
    """One sequence to complete. Compared by identity; the scheduler changes it in place.

    `top_k=-1` disables top-k. Times are seconds of the scheduler's clock. A lower `priority` is served first.
    `tenant` is the unit of sharing of the policy "fair_share"; `deadline`, a time of the scheduler's clock, is the sort
    key of the policy "deadline".

    Cached KV is shared among requests of equal `salt`. `is_long` is the side of the scheduler's `switch_len` that the
    KV belongs to (None without such a length), and separates cached KV too. `fork_of` names a request with the same
    prompt that was queued earlier and is not prefilled yet: the fork reuses its prefill (see `ForkTable`).

    `num_computed_tokens` counts the leading tokens of prompt + output with KV in the cache; the newest token of a
    decoding request is not among them. `num_planned_tokens` includes those of the pending steps. `sequence_number` is
    the order of arrival and `rank` the sort key of the waiting queue; `add_request` sets both.
    """

    __slots__ = (
        "_num_computed",
        "_num_planned",
        "arrival_time",
        "deadline",
        "finish_time",
        "first_token_time",
        "fork_of",
        "is_long",
        "kv_block_ids",
        "max_new_tokens",
        "num_preemptions",
        "output_token_ids",
        "priority",
        "prompt_token_ids",
        "rank",
        "request_id",
        "salt",
        "sequence_number",
        "slot",
        "status",
        "temperature",
        "tenant",
        "top_k",
        "top_p",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        status: RequestStatus = RequestStatus.WAITING,
        output_token_ids: list[int] | None = None,
        arrival_time: float | None = None,
        first_token_time: float | None = None,
        finish_time: float | None = None,
        kv_block_ids: list[int] | None = None,
        num_computed_tokens: int = 0,
        priority: int = 0,
        num_preemptions: int = 0,
        sequence_number: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        salt: str = "",
        fork_of: "Request | None" = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.status = status
        self.output_token_ids: list[int] = [] if output_token_ids is None else output_token_ids
        self.arrival_time = time.time() if arrival_time is None else arrival_time
        self.first_token_time = first_token_time
        self.finish_time = finish_time
        self.kv_block_ids: list[int] = [] if kv_block_ids is None else kv_block_ids
        self.priority = priority
        self.num_preemptions = num_preemptions
        self.sequence_number = sequence_number
        self.tenant = tenant
        self.deadline = deadline
        self.salt = salt
        self.fork_of = fork_of
        self.is_long: bool | None = None
        self.rank: Rank = (priority, sequence_number)
        self.slot: DecodeSlot | None = None
        self._num_computed = num_computed_tokens
        self._num_planned = num_computed_tokens

    def __repr__(self) -> str:
        progress = f"{self.num_computed_tokens}/{self.total_tokens} tokens computed"
        return f"Request({self.request_id!r}, {self.status.value}, {progress})"

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
    def kv_salt(self) -> str:
        """A text that differs for requests that must not share cached KV."""
        # A suffix of fixed length for every salt, so that no two pairs have the same text.
        return self.salt if self.is_long is None else f"{self.salt}\0{self.is_long:d}"

    @property
    def num_computed_tokens(self) -> int:
        slot = self.slot
        if slot is None or slot.computed_offset is None:
            return self._num_computed
        return slot.computed_offset + slot.clock.committed

    @property
    def num_planned_tokens(self) -> int:
        slot = self.slot
        return self._num_planned if slot is None else slot.planned_offset + slot.clock.planned

    def plan_up_to(self, num_tokens: int) -> None:
        """Count the first `num_tokens` tokens of the prefill as planned."""
        self._num_planned = num_tokens

    def compute_up_to(self, num_tokens: int) -> None:
        """Count the first `num_tokens` tokens as computed."""
        self._num_computed = num_tokens

    def leave_slot(self) -> None:
        """Keep the counts that the slot had."""
        self._num_planned, self._num_computed = self.num_planned_tokens, self.num_computed_tokens
        self.slot = None

    def forget_progress(self) -> None:
        """Count all KV as lost."""
        self._num_planned = self._num_computed = 0
