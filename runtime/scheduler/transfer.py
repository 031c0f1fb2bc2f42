"""Follows the requests of strict mode from the prefill worker to the decode worker, as an explicit state machine.

    QUEUED -> PREFILLING -> SENDING -> RECEIVED -> DECODING

A request's KV is copied in pieces. While later chunks of a long prompt are still computed, the full blocks of the
earlier ones are handed out already (`stream`); what is left follows the last chunk. The decode worker may start only
when every layer of every piece has arrived on every rank and the pieces add up to all the tokens (the length gate).

From hand-out to acknowledgement both block tables are pinned: the request is no victim, and aborting it frees nothing
yet. A copy whose lease runs out may still be writing; so nothing is freed or sent again before the transport has
answered the request to cancel it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

from sageLLM.runtime.scheduler.batch import KVMigration
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.request import Request


class TransferState(Enum):
    """Where a request of strict mode stands."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    SENDING = "sending"
    RECEIVED = "received"
    DECODING = "decoding"
    ENDED = "ended"


class TransferEvent(Enum):
    """What happens to it. LOSE: its KV is gone (preempted, a worker died, the copy failed too often)."""

    ADMIT = "admit"
    PREFILL_DONE = "prefill_done"
    ALL_ARRIVED = "all_arrived"
    START = "start"
    LOSE = "lose"
    END = "end"


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
    """How KV travels between the workers.

    - `stream`: hand out the full blocks of a prompt while its later chunks are computed.
    - `lease_s`: seconds of the scheduler's clock after which an unacknowledged copy is to be cancelled; None: never.
    - `max_attempts`: how often the copy of a request is tried before its prompt is computed again.
    - `num_ranks`, `num_layers`: how many acknowledgements complete a piece; 1 and 1 if the transport sums them up.
    """

    stream: bool = True
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
    """One request's transfer. `in_the_air` maps a piece's first token to the piece and who has received what of it."""

    request: Request
    attempt: int
    state: TransferState = TransferState.QUEUED
    num_failures: int = 0
    num_handed_out: int = 0
    num_arrived: int = 0
    in_the_air: dict[int, tuple[KVMigration, set[tuple[int, int]]]] = field(default_factory=dict)
    lease_end: float | None = None
    is_cancelling: bool = False

    def on(self, event: TransferEvent) -> None:
        """Go to the next state; an event that the state does not know is a defect of the scheduler."""
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise RuntimeError(f"{self.request.request_id!r} is {self.state.value}: {event.value} cannot happen")
        self.state = after

    @property
    def is_complete(self) -> bool:
        """The length gate: the prefill is over and all its tokens have arrived."""
        return self.state is TransferState.SENDING and self.num_arrived == self.request.num_computed_tokens


class TransferPhase:
    """All transfers between admission and decoding, by request id.

    `waiting`: those with tokens to hand out. `copying`: those with a piece in the air, ended ones included.
    """

    def __init__(self, kv: KVPlacement, config: TransferConfig) -> None:
        self.transfers: dict[str, Transfer] = {}
        self.waiting: dict[str, Transfer] = {}
        self.copying: dict[str, Transfer] = {}
        self._kv = kv
        self._config = config
        self._attempts = count()  # of all requests: a message of a request's earlier life is of no attempt of this one

    def __len__(self) -> int:
        return sum(transfer.state is TransferState.SENDING for transfer in self.transfers.values())

    # --- the request's side ---

    def admit(self, request: Request) -> None:
        """The request has blocks on both workers."""
        transfer = self.transfers[request.request_id] = Transfer(request, next(self._attempts))
        transfer.on(TransferEvent.ADMIT)

    def computed(self, request: Request, is_last: bool) -> None:
        """More of the prompt is computed; with the last chunk the rest may go."""
        transfer = self.transfers[request.request_id]
        if is_last:
            transfer.on(TransferEvent.PREFILL_DONE)
        if is_last or self._config.stream:
            self.waiting[request.request_id] = transfer

    def leave(self, request: Request, event: TransferEvent) -> None:
        """The request is preempted or ends. A piece in the air stays in `copying` until the transport is done."""
        transfer = self.transfers.pop(request.request_id, None)
        if transfer is not None:
            self.waiting.pop(request.request_id, None)
            transfer.on(event)

    # --- handing out ---

    def plan(self, plan: StepPlan, now: float) -> None:
        """Hand out what can be copied."""
        for transfer in list(self.waiting.values()):
            self._hand_out(transfer, plan, now)
        self.waiting = {}

    def _hand_out(self, transfer: Transfer, plan: StepPlan, now: float) -> None:
        request, start = transfer.request, transfer.num_handed_out
        end = request.num_computed_tokens
        if transfer.state is not TransferState.SENDING:
            end -= end % self._kv.block_size
        if end <= start:
            return
        if not self._kv.is_target_known(request.request_id):
            plan.given[request.request_id] = self._kv.announce_target(request.request_id)
        piece = self._kv.copy_of(request.request_id, start, end - start, transfer.attempt)
        plan.migrations.append(piece)
        transfer.in_the_air[start] = (piece, set())
        transfer.num_handed_out = end
        transfer.is_cancelling = False
        transfer.lease_end = None if self._config.lease_s is None else now + self._config.lease_s
        self.copying[request.request_id] = transfer

    def take_back(self, piece: KVMigration, was_announced: bool) -> None:
        """The engine has not heard of this piece after all."""
        transfer = self.sender_of(piece.request_id, piece.start, piece.attempt)
        if transfer is None:
            return
        del transfer.in_the_air[piece.start]
        transfer.num_handed_out = piece.start
        transfer.attempt = next(self._attempts)
        if was_announced:
            self._kv.forget_target(piece.request_id)
        if self.transfers.get(piece.request_id) is transfer:
            self.waiting[piece.request_id] = transfer
        self._settle(transfer)

    # --- the transport's side ---

    def sender_of(self, request_id: str, start: int, attempt: int) -> Transfer | None:
        """The transfer that has this piece, in this attempt, in the air: handed out and not acknowledged."""
        transfer = self.copying.get(request_id)
        if transfer is None or start not in transfer.in_the_air:
            return None
        piece, _ = transfer.in_the_air[start]
        return transfer if piece.attempt == attempt else None

    def arrive(self, request_id: str) -> Transfer | None:
        """All pieces in the air have arrived on all ranks. Returns the transfer if it is complete now."""
        transfer = self.copying.get(request_id)
        if transfer is None:
            return None
        for start in list(transfer.in_the_air):
            self._land(transfer, start)
        return self._settle(transfer)

    def arrive_piece(self, piece: KVMigration) -> Transfer | None:
        """One piece has arrived on all ranks. Returns the transfer if it is complete now."""
        transfer = self.sender_of(piece.request_id, piece.start, piece.attempt)
        if transfer is None:
            return None
        self._land(transfer, piece.start)
        return self._settle(transfer)

    def acknowledge(
        self, request_id: str, start: int, attempt: int, rank: int, layers: Iterable[int] | None
    ) -> Transfer | None:
        """One rank has some layers of a piece (None: all). What is late, repeated or unknown changes nothing."""
        transfer = self.sender_of(request_id, start, attempt)
        if transfer is None:
            return None
        _, received = transfer.in_the_air[start]
        received.update((rank, layer) for layer in (range(self._config.num_layers) if layers is None else layers))
        if len(received) < self._config.num_ranks * self._config.num_layers:
            return None
        self._land(transfer, start)
        return self._settle(transfer)

    def fail(self, request_id: str) -> Transfer | None:
        """The copy is over and has not arrived: send the pieces again. Returns the transfer if it was tried too often.

        What arrived stays; the pieces in the air are handed out again under the next attempt's number.
        """
        transfer = self.copying.get(request_id)
        if transfer is None:
            return None
        transfer.num_failures += 1
        self._send_again_from(transfer, min(transfer.in_the_air))
        has_failed = transfer.num_failures >= self._config.max_attempts
        return transfer if has_failed and self.transfers.get(request_id) is transfer else None

    def _send_again_from(self, transfer: Transfer, start: int) -> None:
        transfer.num_handed_out = transfer.num_arrived = start
        transfer.in_the_air.clear()
        transfer.attempt = next(self._attempts)
        transfer.is_cancelling = False
        self._settle(transfer)
        if self.transfers.get(transfer.request.request_id) is transfer:
            self.waiting[transfer.request.request_id] = transfer

    def lose_target(self) -> None:
        """The decode worker has lost its KV: what was sent is sent again, and no copy is under way any more."""
        for transfer in [*self.transfers.values(), *self.copying.values()]:
            if transfer.num_handed_out:
                self._send_again_from(transfer, 0)

    def lose_source(self) -> list[Request]:
        """The prefill worker has lost its KV: no copy is under way any more. Returns whose prompt is to be computed
        again.
        """
        for transfer in list(self.copying.values()):
            transfer.in_the_air.clear()
            self._settle(transfer)
        return [transfer.request for transfer in self.transfers.values()]

    def expire(self, now: float) -> list[KVMigration]:
        """The pieces whose lease has run out, to be cancelled by the transport; named once per lease."""
        late: list[KVMigration] = []
        for transfer in self.copying.values():
            if transfer.lease_end is not None and transfer.lease_end <= now and not transfer.is_cancelling:
                transfer.is_cancelling = True
                late += [piece for piece, _ in transfer.in_the_air.values()]
        return late

    def ask_again(self, pieces: Iterable[KVMigration]) -> None:
        """The engine has not heard that these are to be cancelled."""
        for piece in pieces:
            transfer = self.sender_of(piece.request_id, piece.start, piece.attempt)
            if transfer is not None:
                transfer.is_cancelling = False

    def _land(self, transfer: Transfer, start: int) -> None:
        piece, _ = transfer.in_the_air.pop(start)
        transfer.num_arrived += piece.num_tokens

    def _settle(self, transfer: Transfer) -> Transfer | None:
        """After a piece has left the air: the transfer if it is complete."""
        if transfer.in_the_air:
            return None
        transfer.is_cancelling = False
        self.copying.pop(transfer.request.request_id, None)
        return transfer if transfer.is_complete else None
