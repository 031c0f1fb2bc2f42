"""State machine of the KV transfer of one request in strict mode.

    QUEUED -> PREFILLING -> SENDING -> RECEIVED -> DECODING

From any state LOSE leads back to QUEUED and END to ENDED.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from sageLLM.runtime.scheduler.batch import KVMigration
from sageLLM.runtime.scheduler.request import Request


class TransferState(Enum):
    """State of a request of strict mode."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    SENDING = "sending"
    RECEIVED = "received"
    DECODING = "decoding"
    ENDED = "ended"


class TransferEvent(Enum):
    """Event of a transfer. LOSE: the KV is gone (preemption, a dead worker, too many failed copies)."""

    ADMIT = "admit"
    PREFILL_DONE = "prefill_done"
    ALL_ARRIVED = "all_arrived"
    START = "start"
    LOSE = "lose"
    END = "end"


LeaseEnd = Literal["source", "target"]
"""The worker that sends, or the one that receives."""

_S, _E = TransferState, TransferEvent
TRANSITIONS: dict[tuple[TransferState, TransferEvent], TransferState] = {
    (_S.QUEUED, _E.ADMIT): _S.PREFILLING,
    (_S.PREFILLING, _E.PREFILL_DONE): _S.SENDING,
    (_S.SENDING, _E.ALL_ARRIVED): _S.RECEIVED,
    (_S.RECEIVED, _E.START): _S.DECODING,
} | {
    (state, event): after
    for event, after in ((_E.LOSE, _S.QUEUED), (_E.END, _S.ENDED))
    for state in _S
    if state is not _S.ENDED
}


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Settings of the KV transfer between the workers.

    - `stream`: hand out the full blocks of a prompt while its later chunks are computed.
    - `by_layer`: copy the layers of a chunk while it is computed, each when its KV is complete.
    - `lease_s`: seconds of the scheduler's clock after which an unacknowledged copy is to be cancelled; None: never.
    - `max_attempts`: number of attempts to copy a request before its prompt is recomputed.
    - `num_ranks`, `num_layers`: acknowledgements that complete a piece; 1 and 1 if the transport aggregates them.
    """

    stream: bool = True
    by_layer: bool = False
    lease_s: float | None = None
    max_attempts: int = 3
    num_ranks: int = 1
    num_layers: int = 1

    def __post_init__(self) -> None:
        for name in ("max_attempts", "num_ranks", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lease_s is not None and self.lease_s <= 0:
            raise ValueError(f"lease_s must be above 0, got {self.lease_s}")


@dataclass(slots=True)
class Transfer:
    """Transfer of one request.

    `in_flight` maps the first token of each handed-out piece to the piece and the (rank, layer) pairs that have
    acknowledged it. `leases` has the time at which the lease of each end expires. The first `num_present` tokens had
    KV on the target before, and are not sent.
    """

    request: Request
    attempt: int
    state: TransferState = TransferState.QUEUED
    num_failures: int = 0
    num_handed_out: int = 0
    num_arrived: int = 0
    in_flight: dict[int, tuple[KVMigration, set[tuple[int, int]]]] = field(default_factory=dict)
    leases: dict[LeaseEnd, float] = field(default_factory=dict)
    is_cancelling: bool = False
    num_ranks: int = 1
    num_present: int = 0

    def on(self, event: TransferEvent) -> None:
        """Go to the next state; an event that is not allowed in the current state is a defect of the scheduler."""
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise RuntimeError(f"{self.request.request_id!r} is {self.state.value}: {event.value} cannot happen")
        self.state = after

    @property
    def lease_end(self) -> float | None:
        """The time at which the lease expires unless both ends renew it; None without a lease."""
        return min(self.leases.values(), default=None)

    def renew(self, end: LeaseEnd, lease_end: float) -> None:
        """One end renews its lease."""
        self.leases[end] = lease_end

    @property
    def is_complete(self) -> bool:
        """Length gate: the prefill is complete and all its tokens have arrived."""
        return self.state is TransferState.SENDING and self.num_arrived == self.request.num_computed_tokens

    def hand_out(self, piece: KVMigration, lease_end: float | None) -> None:
        """Record that the engine copies this piece; it starts where the previous one ended."""
        self.in_flight[piece.start] = (piece, set())
        self.num_handed_out = piece.start + piece.num_tokens
        self.is_cancelling = False
        self.leases = {} if lease_end is None else {"source": lease_end, "target": lease_end}

    def acknowledge(self, start: int, rank: int, layers: Iterable[int]) -> int:
        """Record the layers of a piece that one rank has; returns the number of (rank, layer) pairs so far."""
        _, received = self.in_flight[start]
        received.update((rank, layer) for layer in layers)
        return len(received)

    def complete_piece(self, start: int) -> None:
        """Count a piece as arrived."""
        piece, _ = self.in_flight.pop(start)
        self.num_arrived += piece.num_tokens

    def restart(self, start: int, attempt: int) -> None:
        """Send everything from this token on again, under a new attempt number."""
        self.num_handed_out = self.num_arrived = max(start, self.num_present)
        self.in_flight.clear()
        self.attempt = attempt
        self.is_cancelling = False
