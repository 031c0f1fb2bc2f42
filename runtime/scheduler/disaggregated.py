"""Scheduler of prefill and decode workers, each of which steps at its own pace (DistServe, arXiv 2401.09670).

Each worker has a `PDScheduler` of one role. This object decides which worker serves a request, when its KV is copied,
and what happens after a failure. It copies nothing itself: `dispatch` returns commands, and the methods under "answers"
take what the transport reports. No tensors, no threads, and an injected clock: simulations run it as it is.

    waiting on a prefill worker -> prefilling, its blocks on a decode worker reserved, finished chunks being copied ->
    prefilled -> every piece received and verified -> decoding

A request that loses its KV, by a preemption, a lost worker or failed copies, is prefilled again from its prompt and
tokens so far. Blocks that a copy reads or writes are reused only when both ends have stopped or died.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sageLLM.runtime.scheduler.batch import Chunk, KVMigration
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.member import Member, WorkerStatus
from sageLLM.runtime.scheduler.migration import Migration
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.scheduler.plan import Role, StepPlan
from sageLLM.runtime.scheduler.prefix_loans import PrefixLoans
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.transfer import LeaseEnd, Transfer, TransferConfig, TransferEvent, TransferState

LoadFailurePolicy = Literal["recompute", "fail"]
"""The treatment of a request with KV that cannot be transferred."""
MAX_RECOMPUTES = 3
"""A request with KV that could not be transferred ends after so many recomputations."""


class PieceId(NamedTuple):
    """A piece of one attempt to copy the KV of a request."""

    request_id: str
    start: int
    attempt: int


@dataclass(frozen=True, slots=True)
class PushPiece:
    """Command: copy a piece from one worker to another; both have these epochs."""

    piece: KVMigration
    source: int
    target: int
    epochs: tuple[int, int]

    @property
    def id(self) -> PieceId:
        return _id_of(self.piece)


@dataclass(frozen=True, slots=True)
class CancelPiece:
    """Command: stop a piece on these workers, and answer with `stopped` when all have."""

    id: PieceId
    workers: tuple[int, ...]


Command = PushPiece | CancelPiece


def _id_of(piece: KVMigration) -> PieceId:
    return PieceId(piece.request_id, piece.start, piece.attempt)


class Ends:
    """The workers at both ends of each transfer, and the blocks there (`MigrationTables`)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.by_request: dict[str, tuple[Member, Member]] = {}

    def is_target_announced(self, request_id: str) -> bool:
        return True

    def announce_target(self, request_id: str) -> list[int]:
        return []

    def retract_target(self, request_id: str) -> None:
        return

    def copy_of(self, request_id: str, start: int, num_tokens: int, attempt: int) -> KVMigration:
        source, target = (end.blocks_of(request_id, start, num_tokens) for end in self.by_request[request_id])
        return KVMigration(request_id, source, target, num_tokens, start, attempt)


class DisaggregatedScheduler:
    """Schedules requests over prefill and decode workers. The engine plans and commits the steps of each `PDScheduler`.

    The engine calls `dispatch` whenever a step has been committed or an answer has arrived.
    """

    def __init__(
        self,
        schedulers: Sequence[PDScheduler],
        config: TransferConfig,
        clock: Callable[[], float],
        *,
        num_ranks: Sequence[int] = (),
        policy: LoadFailurePolicy = "recompute",
    ) -> None:
        """`num_ranks` are those of each worker, by default one."""
        ranks = num_ranks or [1] * len(schedulers)
        self.members = [Member(i, *pair) for i, pair in enumerate(zip(schedulers, ranks, strict=True))]
        first = min(schedulers, key=lambda one: one.limits.max_seq_len or 0)
        self.limits: SequenceLimits = first.limits
        self._ends = Ends(min(member.block_size for member in self.members))
        self._config = config
        self._migration = Migration(self._ends, config, clock)
        self._loans = PrefixLoans(self._ends.by_request, self._migration)
        self._load_failure_policy = policy
        self._home: dict[str, Member] = {}
        self._unplaced: dict[str, Request] = {}
        self._leaving: dict[str, tuple[Member, Member]] = {}
        self._stopped: dict[str, set[int]] = {}
        self._cancels: list[CancelPiece] = []
        self._num_failures: dict[str, int] = {}
        self._num_arrivals = 0
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._unservable: list[tuple[Request, str]] = []
        self._moves: list[tuple[int, str]] = []

    # --- requests ---

    @property
    def max_seq_len(self) -> int | None:
        return self.limits.max_seq_len

    def why_not_acceptable(self, request: Request) -> str | None:
        """The reason why `add_request` would refuse the request, or None."""
        request_id = request.request_id
        if request_id in self._home or request_id in self._unplaced:
            return f"request {request_id!r} is already being served; ids of live requests must differ"
        if request_id in self._leaving:
            return f"request {request_id!r} was aborted while its KV is copied; its id can be used again after that"
        for member in self.members:
            if (reason := member.scheduler.why_not_acceptable(request)) is not None:
                return reason
        return None

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an empty, used or duplicate one, and for one that can never run."""
        reason = self.why_not_acceptable(request)
        if reason is not None:
            raise ValueError(reason)
        request.sequence_number = self._num_arrivals
        self._num_arrivals += 1
        self._unplaced[request.request_id] = request

    def abort_request(self, request_id: str) -> bool:
        """End a request in any state; False when no live request has this id."""
        request = self._unplaced.pop(request_id, None)
        if request is not None:
            request.status = RequestStatus.FINISHED
            for name in self._loans.of(request_id):
                self._abandon(name, TransferEvent.END)
            return True
        member = self._home.pop(request_id, None)
        if member is None:
            return False
        self._abandon(request_id, TransferEvent.END)
        member.dequeue(request_id)
        return member.scheduler.abort_request(request_id)

    def forks_of(self, request_id: str) -> list[Request]:
        """Workers of one role prefill each answer to a prompt."""
        return []

    # --- planning ---

    def dispatch(self) -> list[Command]:
        """Move requests to where they are computed next; returns the copies to begin and to stop."""
        self._forget_ended()
        for member in self.members:
            if member.role == "decode" or not member.accepts:
                self._withdraw(member)
            self._switch_role(member)
        self._place()
        for member in self.members:
            if member.role == "prefill" and member.is_up:
                self._hand_out(member)
        step = StepPlan()
        self._migration.add_to(step)
        for piece in step.to_cancel:
            self._cancel(piece)
        commands: list[Command] = [*self._cancels]
        self._cancels = []
        commands += [self._push(piece) for piece in step.migrations]
        return commands

    def _forget_ended(self) -> None:
        """End the transfers of requests that ended with a step of their worker."""
        requests = [transfer.request for transfer in self._migration.transfers.values()]
        for request in requests:
            if request.status is RequestStatus.FINISHED:
                self._abandon(request.request_id, TransferEvent.END)

    def ended(self, request_ids: Iterable[str]) -> None:
        """These requests have ended with a step that was committed."""
        for request_id in request_ids:
            member = self._home.pop(request_id, None)
            if member is not None:
                member.dequeue(request_id)
                self._num_failures.pop(request_id, None)

    def _withdraw(self, member: Member) -> None:
        """Take the requests that wait on a worker that will not compute them."""
        for request in member.handover.stranded():
            member.handover.withdraw(request)
            member.dequeue(request.request_id)
            del self._home[request.request_id]
            self._moves.append((member.number, request.request_id))
            self._unplaced[request.request_id] = request

    def _place(self) -> None:
        """Queue requests on the prefill workers, where they have the least to compute."""
        workers = [member for member in self.members if member.role == "prefill" and member.accepts]
        if not workers:
            return
        for request in sorted(self._unplaced.values(), key=lambda one: one.sequence_number) if self._unplaced else ():
            if self._loans.is_waiting(request.request_id):
                continue
            best = min(workers, key=lambda member: member.prefill_cost(request))
            if self._loans.begin(request, best, [m for m in self.members if m.role == "decode" and m.accepts]):
                self._counters["total_read_back"] += 1
                continue
            del self._unplaced[request.request_id]
            best.enqueue(request)
            self._home[request.request_id] = best

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

    def hand_out_planned(self, number: int, chunks: Iterable[Chunk]) -> list[PushPiece]:
        """The pieces of chunks that this worker is about to compute, to be copied layer by layer meanwhile."""
        member, found = self.members[number], list[PushPiece]()
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
        targets = [member for member in self.members if member.role == "decode" and member.accepts]
        for target in sorted(targets, key=lambda member: member.decode_cost(request)):
            num_present = target.handover.reserve(request)
            if num_present is not None:
                self._ends.by_request[request_id] = source, target
                source.handover.pin(request_id)
                self._migration.admit(request, min(num_present, request.total_tokens), target.num_ranks)
                self._counters["total_present_tokens"] += num_present
                return self._migration.transfers[request_id]
        return None

    def _push(self, piece: KVMigration) -> PushPiece:
        source, target = self._ends.by_request[piece.request_id]
        self._counters["total_pieces"] += 1
        self._counters["total_sent_tokens"] += piece.num_tokens
        return PushPiece(piece, source.number, target.number, (source.epoch, target.epoch))

    def _cancel(self, piece: KVMigration) -> None:
        ends = self._ends.by_request[piece.request_id]
        workers = tuple(member.number for member in ends if member.is_up)
        self._cancels.append(CancelPiece(_id_of(piece), workers))

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
        source.dequeue(request.request_id)
        self._moves.append((source.number, request.request_id))
        target.handover.start(request.request_id, transfer.num_arrived)
        self._home[request.request_id] = target
        transfer.on(TransferEvent.START)
        self._counters["total_handed_over"] += 1

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
        self._counters["total_failed"] += 1
        if self._migration.fail(request_id) is None:
            return
        if self._loans.is_loan(request_id):
            self._abandon(request_id, TransferEvent.END)
            return
        source, _ = self._ends.by_request[request_id]
        self._abandon(request_id, TransferEvent.LOSE)
        self._num_failures[request_id] = self._num_failures.get(request_id, 0) + 1
        if self._load_failure_policy == "fail" or self._num_failures[request_id] > MAX_RECOMPUTES:
            self._unservable.append((request, "its KV could not be transferred to a decode worker"))
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

    def lose_worker(self, number: int) -> None:
        """A worker has died; it restarts with an empty KV cache (`worker_is_up`).

        The engine stops the copies from and to it on the other end, as the commands say.
        """
        lost = self.members[number]
        lost.is_up = False
        lost.epoch += 1
        for request_id, ends in list(self._ends.by_request.items()):
            if lost in ends and request_id in self._migration.transfers:
                self._abandon(request_id, TransferEvent.LOSE)
            elif lost in ends:  # its cancellation now depends on the other end alone
                for piece, _ in self._migration.copying[request_id].in_flight.values():
                    self._cancel(piece)
        lost.scheduler.lose_kv()

    def worker_is_up(self, number: int) -> None:
        """A lost worker has started again."""
        self.members[number].is_up = True

    def set_role(self, number: int, role: Role) -> None:
        """Let a worker take another role when its requests have left. ValueError if its old role had no worker then."""
        member = self.members[number]
        if role == (member.next_role or member.role):
            return
        left = [one for one in self.members if one is not member and (one.next_role or one.role) == member.role]
        if role != member.role and not left:
            raise ValueError(f"worker {number} must keep its role: it is the only {member.role} worker")
        member.next_role = None if role == member.role else role

    def _switch_role(self, member: Member) -> None:
        if member.next_role is None or not member.is_up or not member.handover.is_drained:
            return
        if any(member in ends for ends in self._ends.by_request.values()):
            return
        member.scheduler.set_role(member.next_role)
        member.next_role = None

    # --- reports ---

    def take_moves(self) -> list[tuple[int, str]]:
        """The requests that have left a worker since the last call, with its number."""
        moves, self._moves = self._moves, []
        return moves

    def take_unservable(self) -> list[tuple[Request, str]]:
        """The requests that cannot be served, and why; the engine ends them."""
        found, self._unservable = self._unservable, []
        return found

    def is_in_flight(self, piece: PieceId) -> bool:
        """Whether the end of a piece is not known yet."""
        return self._migration.transfer_of(*piece) is not None

    def workers(self) -> list[WorkerStatus]:
        return [member.status() for member in self.members]

    def transfer_state(self, request_id: str) -> TransferState | None:
        """The state of a live request."""
        transfer = self._migration.transfers.get(request_id)
        if transfer is not None:
            return transfer.state
        member = self._home.get(request_id)
        if member is None:
            return TransferState.QUEUED if request_id in self._unplaced else None
        if member.role == "decode":
            return TransferState.DECODING
        return TransferState.QUEUED if request_id in member.scheduler.waiting_queue else TransferState.PREFILLING

    def get_stats(self) -> dict[str, int]:
        """The sums of the workers' counters and sizes, and those of the transfers."""
        stats: dict[str, int] = {}
        for member in self.members:
            for name, value in member.scheduler.get_stats().items():
                stats[name] = stats.get(name, 0) + value
        stats["num_waiting"] += len(self._unplaced)
        stats["migrating_size"] = self._migration.num_sending
        stats["total_migrations"] = self._counters["total_pieces"]
        return stats | self._counters

    @property
    def transfers(self) -> Mapping[str, Transfer]:
        """The transfers of live requests, and of prefixes that are read back, by name."""
        return self._migration.transfers

    def homes(self) -> Mapping[str, Member]:
        """The worker of each request that is on one."""
        return self._home

    def check_integrity(self) -> None:
        """Check each scheduler, and that every transfer has blocks at both ends."""
        for member in self.members:
            member.scheduler.check_integrity()
        ended = {request_id for request_id in self._ends.by_request if request_id not in self._migration.transfers}
        assert ended == self._leaving.keys(), "an ended transfer must be leaving"
        assert self._migration.transfers.keys() <= self._ends.by_request.keys(), "a transfer must have two ends"
        for request_id, member in self._home.items():
            live = request_id in member.scheduler.running_requests or request_id in member.scheduler.waiting_queue
            assert live, f"request {request_id!r} is not on its worker"


COUNTERS = (
    "total_handed_over",
    "total_pieces",
    "total_sent_tokens",
    "total_present_tokens",
    "total_failed",
    "total_read_back",
)
