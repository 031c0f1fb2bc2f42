"""A request as the scheduler sees it: what was asked for, what has come out, and how far its KV has got."""

import time
from enum import Enum

Rank = tuple[float, int]


class RequestStatus(Enum):
    """Where a request stands; FINISHED covers aborted ones too."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class DecodeClock:
    """Counts the decode steps that were planned and those that were committed."""

    __slots__ = ("committed", "planned")

    def __init__(self) -> None:
        self.planned = 0
        self.committed = 0


class Seat:
    """A decoding request's place in the decode line.

    Every decode step takes each seat one token further, so the counts of all requests are kept as offsets from one
    clock and a step costs the same however many decode. A seat that sits a step out is moved back by one.
    `computed_offset` is None while the request's prefill is planned and not committed. `growth_tick` and `end_tick` are
    the steps at which the request needs a block and at which it may be full.
    """

    __slots__ = ("clock", "computed_offset", "end_tick", "growth_tick", "planned_offset", "request")

    def __init__(self, request: "Request", clock: DecodeClock, num_planned: int) -> None:
        self.request = request
        self.clock = clock
        self.planned_offset = num_planned - clock.planned
        self.computed_offset: int | None = None
        self.growth_tick = 0
        self.end_tick = 0


class Request:
    """One sequence to be completed. Compared by identity; the scheduler changes it in place.

    `top_k=-1` means no top-k limit. Times are seconds of the scheduler's clock. `priority`: the lower is served first.
    `tenant` shares the service with the other tenants under the policy "fair_share"; `deadline`, a time of the
    scheduler's clock, orders the requests under the policy "deadline".

    Cached KV is shared among requests of one `salt`. `fork_of` names a request with the same prompt, queued
    before and not yet prefilled: this one needs no prefill of its own (see `ForkLine`).

    `num_computed_tokens` counts the leading tokens of prompt + output whose KV is in the cache; a decoding request's
    newest token is not among them. `num_planned_tokens` counts those of the steps in flight as well.
    `sequence_number` is its place in the order of arrival and `rank` its place in line, both given by `add_request`.
    """

    __slots__ = (
        "_num_computed",
        "_num_planned",
        "arrival_time",
        "deadline",
        "finish_time",
        "first_token_time",
        "fork_of",
        "kv_block_ids",
        "max_new_tokens",
        "num_preemptions",
        "output_token_ids",
        "priority",
        "prompt_token_ids",
        "rank",
        "request_id",
        "salt",
        "seat",
        "sequence_number",
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
        self.rank: Rank = (priority, sequence_number)
        self.seat: Seat | None = None
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
    def num_computed_tokens(self) -> int:
        seat = self.seat
        if seat is None or seat.computed_offset is None:
            return self._num_computed
        return seat.computed_offset + seat.clock.committed

    @property
    def num_planned_tokens(self) -> int:
        seat = self.seat
        return self._num_planned if seat is None else seat.planned_offset + seat.clock.planned

    def plan_up_to(self, num_tokens: int) -> None:
        """A step in flight computes the prefill up to this token."""
        self._num_planned = num_tokens

    def compute_up_to(self, num_tokens: int) -> None:
        """The KV of the tokens up to this one is in the cache."""
        self._num_computed = num_tokens

    def take_seat(self, seat: Seat) -> None:
        """From now on the decode line counts the request's tokens."""
        self.seat = seat

    def leave_seat(self) -> None:
        """Keep the counts that the decode line had."""
        self._num_planned, self._num_computed = self.num_planned_tokens, self.num_computed_tokens
        self.seat = None

    def forget_progress(self) -> None:
        """All KV is lost."""
        self._num_planned = self._num_computed = 0
