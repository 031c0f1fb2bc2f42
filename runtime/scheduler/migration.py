"""Migration of KV from the prefill worker to the decode worker in strict mode.

The KV of a request is copied in pieces: the full blocks of earlier chunks while later chunks are computed (`stream`),
and the rest after the last chunk. The decode worker may start only when every layer of every piece has arrived on every
rank and the pieces add up to all tokens (the length gate).

From hand-out to acknowledgement both block tables are pinned: the request is never a victim, and aborting it frees
nothing yet, because the transport may still read the source and write the target. The same holds for a copy with an
expired lease: nothing is freed or sent again before the transport has answered the request to cancel it.
"""

from collections.abc import Callable, Iterable
from itertools import count
from typing import Protocol

from sageLLM.runtime.scheduler.batch import KVMigration
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.transfer import LeaseEnd, Transfer, TransferConfig, TransferEvent, TransferState


class MigrationTables(Protocol):
    """The block tables of both ends of the transfers."""

    block_size: int

    def is_target_announced(self, request_id: str) -> bool: ...
    def announce_target(self, request_id: str) -> list[int]: ...
    def retract_target(self, request_id: str) -> None: ...
    def copy_of(self, request_id: str, start: int, num_tokens: int, attempt: int) -> KVMigration: ...


class Migration:
    """All transfers between admission and decoding, by request id.

    `ready` holds those with tokens to hand out, `copying` those with a piece in flight (ended requests included).
    """

    def __init__(self, kv: MigrationTables, config: TransferConfig, clock: Callable[[], float]) -> None:
        self.transfers: dict[str, Transfer] = {}
        self.ready: dict[str, Transfer] = {}
        self.copying: dict[str, Transfer] = {}
        self._kv = kv
        self._config = config
        self._clock = clock
        # One sequence of attempt numbers for all requests. The attempt works as an epoch: after a failure, or when a
        # request is preempted and migrates again, its pieces have the same start as before, and only the number tells
        # a late acknowledgement of the earlier copy (to be dropped) from one of the current copy.
        self._attempts = count()

    @property
    def num_sending(self) -> int:
        """Requests with a complete prefill that do not decode yet."""
        return sum(transfer.state is TransferState.SENDING for transfer in self.transfers.values())

    # --- events of the request ---

    def admit(self, request: Request, num_present: int = 0, num_ranks: int | None = None) -> None:
        """The request has blocks on both workers, and its first `num_present` tokens have KV on the second one.

        A piece is complete when `num_ranks` ranks (None: as configured) have acknowledged it.
        """
        transfer = Transfer(request, next(self._attempts), num_ranks=num_ranks or self._config.num_ranks)
        transfer.num_present = transfer.num_handed_out = transfer.num_arrived = num_present
        self.transfers[request.request_id] = transfer
        transfer.on(TransferEvent.ADMIT)

    def note_computed(self, request: Request, is_last: bool) -> None:
        """A chunk of the prompt was committed; its full blocks can be sent, after the last chunk all the rest."""
        transfer = self.transfers[request.request_id]
        if is_last:
            transfer.on(TransferEvent.PREFILL_DONE)
        if is_last or self._config.stream:
            self.ready[request.request_id] = transfer

    def leave(self, request: Request, event: TransferEvent) -> None:
        """The request is preempted or ends. A piece in flight stays in `copying` until the transport is done."""
        transfer = self.transfers.pop(request.request_id, None)
        if transfer is not None:
            self.ready.pop(request.request_id, None)
            transfer.on(event)

    # --- hand-out ---

    def add_to(self, step: StepPlan) -> None:
        """Add copies of all tokens that are ready, and cancellations of copies with an expired lease."""
        now = 0.0 if self._config.lease_s is None else self._clock()
        step.to_cancel = self._expired(now)  # before hand-out, which starts new leases
        for transfer in self.ready.values():
            self._hand_out(transfer, step, now)
        self.ready = {}

    def _hand_out(self, transfer: Transfer, step: StepPlan, now: float) -> None:
        request, start = transfer.request, transfer.num_handed_out
        end = request.num_computed_tokens
        if transfer.state is not TransferState.SENDING:
            end -= end % self._kv.block_size  # a partial block is still being written
        if end <= start:
            return
        if not self._kv.is_target_announced(request.request_id):
            step.new_blocks[request.request_id] = self._kv.announce_target(request.request_id)
        piece = self._kv.copy_of(request.request_id, start, end - start, transfer.attempt)
        step.migrations.append(piece)
        transfer.hand_out(piece, None if self._config.lease_s is None else now + self._config.lease_s)
        self.copying[request.request_id] = transfer

    def hand_out_planned(self, transfer: Transfer, end: int, is_last: bool) -> KVMigration | None:
        """The piece up to token `end` of a chunk that is about to be computed; None if it has no full block.

        The tokens before the chunk have been computed, or will be when its step begins.
        """
        request, start = transfer.request, transfer.num_handed_out
        if not is_last:
            end -= end % self._kv.block_size
        if end <= start or transfer.is_cancelling:
            return None
        piece = self._kv.copy_of(request.request_id, start, end - start, transfer.attempt)
        transfer.hand_out(piece, None if self._config.lease_s is None else self._clock() + self._config.lease_s)
        self.copying[request.request_id] = transfer
        return piece

    def _expired(self, now: float) -> list[KVMigration]:
        """The pieces with an expired lease; each is reported once per lease."""
        expired: list[KVMigration] = []
        for transfer in self.copying.values():
            if transfer.lease_end is not None and transfer.lease_end <= now and not transfer.is_cancelling:
                transfer.is_cancelling = True
                expired += [piece for piece, _ in transfer.in_flight.values()]
        return expired

    def take_back(self, piece: KVMigration, was_announced: bool) -> None:
        """Undo the hand-out of a piece: its step was rolled back."""
        transfer = self.transfer_of(piece.request_id, piece.start, piece.attempt)
        if transfer is None:
            return
        del transfer.in_flight[piece.start]
        transfer.num_handed_out = piece.start
        transfer.attempt = next(self._attempts)
        if was_announced:
            self._kv.retract_target(piece.request_id)
        if self.transfers.get(piece.request_id) is transfer:
            self.ready[piece.request_id] = transfer
        self._settle(transfer)

    def renew_cancellations(self, pieces: Iterable[KVMigration]) -> None:
        """Report these cancellations again: the step that reported them was rolled back."""
        for piece in pieces:
            transfer = self.transfer_of(piece.request_id, piece.start, piece.attempt)
            if transfer is not None:
                transfer.is_cancelling = False

    # --- answers of the transport ---

    def transfer_of(self, request_id: str, start: int, attempt: int) -> Transfer | None:
        """The transfer that has this piece, of this attempt, in flight."""
        transfer = self.copying.get(request_id)
        if transfer is None or start not in transfer.in_flight:
            return None
        piece, _ = transfer.in_flight[start]
        return transfer if piece.attempt == attempt else None

    def confirm(self, request_id: str) -> Transfer | None:
        """All pieces in flight have arrived on all ranks. Returns the transfer if it is now complete."""
        transfer = self.copying.get(request_id)
        if transfer is None:
            return None
        for start in list(transfer.in_flight):
            transfer.complete_piece(start)
        return self._settle(transfer)

    def confirm_piece(self, piece: KVMigration) -> Transfer | None:
        """One piece has arrived on all ranks. Returns the transfer if it is now complete."""
        transfer = self.transfer_of(piece.request_id, piece.start, piece.attempt)
        if transfer is None:
            return None
        transfer.complete_piece(piece.start)
        return self._settle(transfer)

    def acknowledge(
        self, request_id: str, start: int, attempt: int, rank: int, layers: Iterable[int] | None
    ) -> Transfer | None:
        """One rank has some layers of a piece (None: all). Late, repeated and unknown messages change nothing."""
        transfer = self.transfer_of(request_id, start, attempt)
        if transfer is None:
            return None
        num_received = transfer.acknowledge(start, rank, range(self._config.num_layers) if layers is None else layers)
        if num_received < transfer.num_ranks * self._config.num_layers:
            return None
        transfer.complete_piece(start)
        return self._settle(transfer)

    def renew(self, request_id: str, start: int, attempt: int, end: LeaseEnd) -> None:
        """One end of a piece in flight is at work: its side of the lease lasts longer."""
        transfer = self.transfer_of(request_id, start, attempt)
        if transfer is not None and self._config.lease_s is not None:
            transfer.renew(end, self._clock() + self._config.lease_s)

    def fail(self, request_id: str) -> Transfer | None:
        """The copies of the request have stopped and not arrived: send them again.

        Pieces that arrived stay; those in flight are handed out again under a new attempt number. Returns the transfer
        if its attempts are used up.
        """
        transfer = self.copying.get(request_id)
        if transfer is None:
            return None
        transfer.num_failures += 1
        self._send_again_from(transfer, min(transfer.in_flight))
        has_failed = transfer.num_failures >= self._config.max_attempts
        return transfer if has_failed and self.transfers.get(request_id) is transfer else None

    def drop(self, request_id: str) -> None:
        """The copies of a request that has left have stopped."""
        transfer = self.copying.get(request_id)
        if transfer is not None:
            transfer.in_flight.clear()
            self._settle(transfer)

    def lose_target(self) -> None:
        """The decode worker has lost its KV: send everything again. No copy is in flight any more."""
        for transfer in [*self.transfers.values(), *self.copying.values()]:
            if transfer.num_handed_out:
                self._send_again_from(transfer, 0)

    def lose_source(self) -> list[Request]:
        """The prefill worker has lost its KV, and no copy is in flight any more. Returns the requests to recompute."""
        for transfer in list(self.copying.values()):
            transfer.in_flight.clear()
            self._settle(transfer)
        return [transfer.request for transfer in self.transfers.values()]

    def _send_again_from(self, transfer: Transfer, start: int) -> None:
        transfer.restart(start, next(self._attempts))
        self._settle(transfer)
        if self.transfers.get(transfer.request.request_id) is transfer:
            self.ready[transfer.request.request_id] = transfer

    def _settle(self, transfer: Transfer) -> Transfer | None:
        """Unpin a transfer without pieces in flight; returns it if it is complete."""
        if transfer.in_flight:
            return None
        transfer.is_cancelling = False
        self.copying.pop(transfer.request.request_id, None)
        return transfer if transfer.is_complete else None
