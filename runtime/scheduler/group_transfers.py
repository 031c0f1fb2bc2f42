"""Transfers of KV between the workers of a group: when a piece is copied, and what follows its end.

A transfer begins when blocks for a request are reserved on a decode worker. Blocks that a copy reads or writes are
reused only when both ends have stopped or died.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from sageLLM.runtime.scheduler.batch import Chunk, KVMigration
from sageLLM.runtime.scheduler.group_placement import Placement
from sageLLM.runtime.scheduler.member import Member
from sageLLM.runtime.scheduler.migration import Migration
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.prefix_loans import PrefixLoans
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.transfer import LeaseEnd, Transfer, TransferConfig, TransferEvent, TransferState
from sageLLM.runtime.scheduler.transfer_commands import CancelPiece, Command, Ends, PieceId, PushPiece, id_of

LoadFailurePolicy = Literal["recompute", "fail"]
"""The treatment of a request with KV that cannot be transferred."""
MAX_RECOMPUTES = 3
"""A request with KV that could not be transferred ends after so many recomputations."""
COUNTERS = (
    "total_handed_over",
    "total_pieces",
    "total_sent_tokens",
    "total_present_tokens",
    "total_failed",
)


class GroupTransfers:
    """The transfers of all requests. `placement` decides the worker of a request until its KV has arrived."""

    def __init__(
        self,
        members: Sequence[Member],
        config: TransferConfig,
        clock: Callable[[], float],
        policy: LoadFailurePolicy,
    ) -> None:
        self._members = members
        self._ends = Ends(min(member.block_size for member in members))
        self._config = config
        self._migration = Migration(self._ends, config, clock)
        self._loans = PrefixLoans(self._ends.by_request, self._migration)
        self.placement = Placement(members, self._loans)
        self._load_failure_policy = policy
        self._leaving: dict[str, tuple[Member, Member]] = {}
        self._stopped: dict[str, set[int]] = {}
        self._cancels: list[CancelPiece] = []
        self._num_failures: dict[str, int] = {}
        self.unservable: list[tuple[Request, str]] = []
        self.counters = dict.fromkeys(COUNTERS, 0)

    @property
    def by_name(self) -> dict[str, Transfer]:
        """The transfers of live requests, and of prefixes that are read back, by name."""
        return self._migration.transfers

    @property
    def num_sending(self) -> int:
        return self._migration.num_sending

    def is_leaving(self, request_id: str) -> bool:
        """Whether a request has ended while its KV is copied."""
        return request_id in self._leaving

    def is_copying(self, member: Member) -> bool:
        """Whether a transfer has this end."""
        return any(member in ends for ends in self._ends.by_request.values())

    def is_in_flight(self, piece: PieceId) -> bool:
        """Whether the end of a piece is not known yet."""
        return self._migration.transfer_of(*piece) is not None

    def end(self, request_id: str) -> None:
        """A request has ended: so do its transfer, and those of prefixes that it waits for."""
        self._num_failures.pop(request_id, None)
        for name in (request_id, *self._loans.of(request_id)):
            self._abandon(name, TransferEvent.END)

    def end_finished(self) -> None:
        """End the transfers of requests that ended with a step of their worker."""
        requests = [transfer.request for transfer in self._migration.transfers.values()]
        for request in requests:
            if request.status is RequestStatus.FINISHED:
                self._abandon(request.request_id, TransferEvent.END)

    def commands(self) -> list[Command]:
        """The copies to begin and to stop."""
        for member in self._members:
            if member.role == "prefill" and member.is_up:
                self._hand_out(member)
        step = StepPlan()
        self._migration.add_to(step)
        for piece in step.to_cancel:
            self._cancel(piece)
        commands: list[Command] = [*self._cancels]
        self._cancels = []
        return commands + [self._push(piece) for piece in step.migrations]

    def _hand_out(self, member: Member) -> None:
        """Let the finished chunks of a prefill worker be copied, and hand over what has arrived."""
        for request in member.handover.prefilling():
            transfer = self._migration.transfers.get(request.request_id) or self._reserve(request, member)
            if transfer is None or not self._ends.by_request[request.request_id][1].handover.is_ready(
                request.request_id
            ):
                continue
            is_last = member.handover.is_prefilled(request)
            if is_last and transfer.state is TransferState.PREFILLING:
                self._migration.note_computed(request, is_last=True)
            elif request.num_computed_tokens > transfer.num_handed_out:
                self._migration.note_computed(request, is_last=False)
            if not transfer.in_flight:
                self._hand_over(transfer)

    def hand_out_planned(self, member: Member, chunks: Iterable[Chunk]) -> list[PushPiece]:
        """The pieces of chunks that this worker is about to compute, to be copied layer by layer meanwhile."""
        found = list[PushPiece]()
        if not self._config.by_layer or member.role != "prefill" or not member.is_up:
            return found
        for chunk in chunks:
            name = chunk.request.request_id
            transfer = self._migration.transfers.get(name) or self._reserve(chunk.request, member)
            if transfer is None or not self._ends.by_request[name][1].handover.is_ready(name):
                continue
            piece = self._migration.hand_out_planned(transfer, chunk.start + chunk.num_tokens, chunk.is_last)
            if piece is not None:
                found.append(self._push(piece))
        return found

    def _reserve(self, request: Request, source: Member) -> Transfer | None:
        """Reserve blocks on the decode worker with the least load; None if none has room, or an old copy still runs."""
        request_id = request.request_id
        if request_id in self._leaving:
            return None
        for target in sorted(self.placement.accepting("decode"), key=lambda member: member.decode_cost(request)):
            num_present = target.handover.reserve(request)
            if num_present is not None:
                self._ends.by_request[request_id] = source, target
                source.handover.pin(request_id)
                self._migration.admit(request, min(num_present, request.total_tokens), target.num_ranks)
                self.counters["total_present_tokens"] += num_present
                return self._migration.transfers[request_id]
        return None

    def _push(self, piece: KVMigration) -> PushPiece:
        source, target = self._ends.by_request[piece.request_id]
        self.counters["total_pieces"] += 1
        self.counters["total_sent_tokens"] += piece.num_tokens
        return PushPiece(piece, source.number, target.number, (source.epoch, target.epoch))

    def _cancel(self, piece: KVMigration) -> None:
        ends = self._ends.by_request[piece.request_id]
        workers = tuple(member.number for member in ends if member.is_up)
        self._cancels.append(CancelPiece(id_of(piece), workers))

    def _hand_over(self, transfer: Transfer) -> None:
        """Let a request whose KV is complete on the decode worker decode there."""
        if not transfer.is_complete:
            return
        request = transfer.request
        source, target = self._ends.by_request.pop(request.request_id)
        transfer.on(TransferEvent.ALL_ARRIVED)
        del self._migration.transfers[request.request_id]
        if self._loans.is_loan(request.request_id):
            self._loans.release(request.request_id, source, target, transfer.num_arrived)
            return
        source.handover.unpin(request.request_id)
        source.handover.hand_over(request)
        self.placement.move(request.request_id, source, target)
        target.handover.start(request.request_id, transfer.num_arrived)
        transfer.on(TransferEvent.START)
        self.counters["total_handed_over"] += 1

    # --- answers of the transport ---

    def received(self, piece: PieceId, rank: int = 0) -> None:
        """A rank of the target has verified a piece. Late, repeated and unknown answers change nothing."""
        transfer = self._migration.acknowledge(*piece, rank, None)
        if transfer is not None and piece.request_id in self._migration.transfers:
            self._hand_over(transfer)
        self._settle(piece.request_id)

    def stopped(self, piece: PieceId) -> None:
        """Nobody reads or writes for this piece any more, and it has not arrived."""
        transfer = self._migration.transfer_of(*piece)
        if transfer is None:
            return
        self._stopped.setdefault(piece.request_id, set()).add(piece.start)
        if not transfer.is_cancelling:
            transfer.is_cancelling = True
            for start, (other, _) in transfer.in_flight.items():
                if start not in self._stopped[piece.request_id]:
                    self._cancel(other)
        self._settle(piece.request_id)

    def renew(self, piece: PieceId, end: LeaseEnd) -> None:
        """One end is at work on a piece."""
        self._migration.renew(*piece, end)

    def _settle(self, request_id: str) -> None:
        """Act on a transfer of which every piece in flight has stopped."""
        transfer = self._migration.copying.get(request_id)
        stopped = self._stopped.get(request_id, set())
        if transfer is not None and transfer.in_flight.keys() <= stopped:
            if self._migration.transfers.get(request_id) is transfer:
                self._fail(transfer)
            else:
                self._migration.drop(request_id)
        if request_id not in self._migration.copying:
            self._stopped.pop(request_id, None)
            if request_id in self._leaving:
                self._release(request_id, *self._leaving.pop(request_id))

    def _fail(self, transfer: Transfer) -> None:
        """Send the pieces again, or give up."""
        request, request_id = transfer.request, transfer.request.request_id
        self.counters["total_failed"] += 1
        if self._migration.fail(request_id) is None:
            return
        if self._loans.is_loan(request_id):
            self._abandon(request_id, TransferEvent.END)
            return
        source, _ = self._ends.by_request[request_id]
        self._abandon(request_id, TransferEvent.LOSE)
        self._num_failures[request_id] = self._num_failures.get(request_id, 0) + 1
        if self._load_failure_policy == "fail" or self._num_failures[request_id] > MAX_RECOMPUTES:
            self.unservable.append((request, "its KV could not be transferred to a decode worker"))
        elif source.handover.is_prefilled(request):
            source.handover.recompute(request)

    def _abandon(self, request_id: str, event: TransferEvent) -> None:
        """End the transfer of a request, if it has one. Its blocks are released when its copies have stopped."""
        transfer = self._migration.transfers.get(request_id)
        if transfer is None:
            return
        self._loans.finish(request_id)
        pieces = [piece for piece, _ in transfer.in_flight.values()]
        self._migration.leave(transfer.request, event)
        if not pieces:
            self._release(request_id, *self._ends.by_request[request_id])
            return
        self._leaving[request_id] = self._ends.by_request[request_id]
        if not transfer.is_cancelling:
            transfer.is_cancelling = True
            for piece in pieces:
                self._cancel(piece)

    def _release(self, request_id: str, source: Member, target: Member) -> None:
        del self._ends.by_request[request_id]
        if self._loans.is_loan(request_id):
            self._loans.release(request_id, source, target)
            return
        source.handover.unpin(request_id)
        target.handover.cancel(request_id)

    # --- workers ---

    def lose_worker(self, lost: Member) -> None:
        """A worker has died; it restarts with an empty KV cache (`worker_is_up`).

        The engine stops the copies from and to it on the other end, as the commands say.
        """
        lost.is_up = False
        lost.epoch += 1
        for request_id, ends in list(self._ends.by_request.items()):
            if lost in ends and request_id in self._migration.transfers:
                self._abandon(request_id, TransferEvent.LOSE)
            elif lost in ends:  # its cancellation now depends on the other end alone
                for piece, _ in self._migration.copying[request_id].in_flight.values():
                    self._cancel(piece)
        lost.scheduler.lose_kv()

    def check_integrity(self) -> None:
        """Check that every transfer has blocks at both ends."""
        ended = {request_id for request_id in self._ends.by_request if request_id not in self._migration.transfers}
        assert ended == self._leaving.keys(), "an ended transfer must be leaving"
        assert self._migration.transfers.keys() <= self._ends.by_request.keys(), "a transfer must have two ends"
