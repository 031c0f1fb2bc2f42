"""Scheduler of prefill and decode workers, each of which steps at its own pace (DistServe, arXiv 2401.09670).

Each worker has a `PDScheduler` of one role. `Placement` decides which worker serves a request, and `GroupTransfers`
when its KV is copied and what happens after a failure. Nothing is copied here: `dispatch` returns commands, and the
methods under "answers" take what the transport reports. No tensors, no threads, and an injected clock: simulations run
it as it is.

    waiting on a prefill worker -> prefilling, its blocks on a decode worker reserved, finished chunks being copied ->
    prefilled -> every piece received and verified -> decoding

A request that loses its KV, by a preemption, a lost worker or failed copies, is prefilled again from its prompt and
tokens so far. Blocks that a copy reads or writes are reused only when both ends have stopped or died.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from sageLLM.runtime.scheduler.batch import Chunk
from sageLLM.runtime.scheduler.group_transfers import GroupTransfers, LoadFailurePolicy
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.member import Member, WorkerStatus
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.transfer import LeaseEnd, Transfer, TransferConfig, TransferState
from sageLLM.runtime.scheduler.transfer_commands import Command, PieceId, PushPiece


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
        self._transfers = GroupTransfers(self.members, config, clock, policy)
        self._placement = self._transfers.placement
        self._num_arrivals = 0

    # --- requests ---

    @property
    def max_seq_len(self) -> int | None:
        return self.limits.max_seq_len

    def why_not_acceptable(self, request: Request) -> str | None:
        """The reason why `add_request` would refuse the request, or None."""
        request_id = request.request_id
        if request_id in self._placement.homes or request_id in self._placement.unplaced:
            return f"request {request_id!r} is already being served; ids of live requests must differ"
        if self._transfers.is_leaving(request_id):
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
        self._placement.unplaced[request.request_id] = request

    def abort_request(self, request_id: str) -> bool:
        """End a request in any state; False when no live request has this id."""
        request = self._placement.unplaced.pop(request_id, None)
        if request is not None:
            request.status = RequestStatus.FINISHED
        elif request_id not in self._placement.homes:
            return False
        self._transfers.end(request_id)
        member = self._placement.leave(request_id)
        return member is None or member.scheduler.abort_request(request_id)

    def ended(self, request_ids: Iterable[str]) -> None:
        """These requests have ended with a step that was committed."""
        for request_id in request_ids:
            self._placement.leave(request_id)

    def forks_of(self, request_id: str) -> list[Request]:
        """Workers of one role prefill each answer to a prompt."""
        return []

    # --- planning ---

    def dispatch(self) -> list[Command]:
        """Move requests to where they are computed next; returns the copies to begin and to stop."""
        self._transfers.end_finished()
        self._placement.withdraw_stranded()
        self._placement.switch_roles(self._transfers.is_copying)
        self._placement.place()
        return self._transfers.commands()

    def hand_out_planned(self, number: int, chunks: Iterable[Chunk]) -> list[PushPiece]:
        """The pieces of chunks that this worker is about to compute, to be copied layer by layer meanwhile."""
        return self._transfers.hand_out_planned(self.members[number], chunks)

    # --- answers of the transport ---

    def received(self, piece: PieceId, rank: int = 0) -> None:
        """A rank of the target has verified a piece. Late, repeated and unknown answers change nothing."""
        self._transfers.received(piece, rank)

    def stopped(self, piece: PieceId) -> None:
        """Nobody reads or writes for this piece any more, and it has not arrived."""
        self._transfers.stopped(piece)

    def renew(self, piece: PieceId, end: LeaseEnd) -> None:
        """One end is at work on a piece."""
        self._transfers.renew(piece, end)

    # --- workers ---

    def lose_worker(self, number: int) -> None:
        """A worker has died; it restarts with an empty KV cache (`worker_is_up`).

        The engine stops the copies from and to it on the other end, as the commands say.
        """
        self._transfers.lose_worker(self.members[number])

    def worker_is_up(self, number: int) -> None:
        """A lost worker has started again."""
        self.members[number].is_up = True

    def set_role(self, number: int, role: Role) -> None:
        """Let a worker take another role when its requests have left.

        ValueError for an unknown worker, and if its old role had no worker then.
        """
        self._placement.set_role(number, role)

    # --- reports ---

    def take_moves(self) -> list[tuple[int, str]]:
        """The requests that have left a worker since the last call, with its number."""
        moves, self._placement.moves = self._placement.moves, []
        return moves

    def take_unservable(self) -> list[tuple[Request, str]]:
        """The requests that cannot be served, and why; the engine ends them."""
        found, self._transfers.unservable = self._transfers.unservable, []
        return found

    def is_in_flight(self, piece: PieceId) -> bool:
        """Whether the end of a piece is not known yet."""
        return self._transfers.is_in_flight(piece)

    def workers(self) -> list[WorkerStatus]:
        return [member.status() for member in self.members]

    def transfer_state(self, request_id: str) -> TransferState | None:
        """The state of a live request."""
        transfer = self.transfers.get(request_id)
        if transfer is not None:
            return transfer.state
        member = self._placement.homes.get(request_id)
        if member is None:
            return TransferState.QUEUED if request_id in self._placement.unplaced else None
        if member.role == "decode":
            return TransferState.DECODING
        return TransferState.QUEUED if request_id in member.scheduler.waiting_queue else TransferState.PREFILLING

    def get_stats(self) -> dict[str, int]:
        """The sums of the workers' counters and sizes, and those of the transfers."""
        stats: dict[str, int] = {}
        for member in self.members:
            for name, value in member.scheduler.get_stats().items():
                stats[name] = stats.get(name, 0) + value
        stats["num_waiting"] += len(self._placement.unplaced)
        stats["migrating_size"] = self._transfers.num_sending
        stats["total_migrations"] = self._transfers.counters["total_pieces"]
        stats["total_read_back"] = self._placement.num_read_back
        return stats | self._transfers.counters

    @property
    def transfers(self) -> Mapping[str, Transfer]:
        """The transfers of live requests, and of prefixes that are read back, by name."""
        return self._transfers.by_name

    def homes(self) -> Mapping[str, Member]:
        """The worker of each request that is on one."""
        return self._placement.homes

    def check_integrity(self) -> None:
        """Check each scheduler, the transfers, and the worker of each request."""
        for member in self.members:
            member.scheduler.check_integrity()
        self._transfers.check_integrity()
        self._placement.check_integrity()
