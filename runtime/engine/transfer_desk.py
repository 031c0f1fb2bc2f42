"""Control of KV transfers between worker processes: signs handles, and turns the reports of ranks into answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sageLLM.runtime.scheduler.disaggregated import DisaggregatedScheduler
from sageLLM.runtime.scheduler.transfer import LeaseEnd
from sageLLM.runtime.scheduler.transfer_commands import CancelPiece, PieceId, PushPiece
from sageLLM.runtime.transport.base import Report
from sageLLM.runtime.transport.handle import End, Handle, PieceKey, SignedHandle, sign
from sageLLM.runtime.transport.shards import routes_between
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.kv_group import CancelKV, CheckKV, KVCommand, KVGroup, PushKV


class KVWorker(Protocol):
    """Executor of a worker, as the desk sees it."""

    @property
    def addresses(self) -> list[str]: ...
    def send(self, command: KVCommand) -> None: ...
    def kill(self, reason: str) -> None: ...


@dataclass(slots=True)
class _Piece:
    """A piece on its way, with the digests that each source rank has reported.

    Until all have, it is the source's turn, and then the target's, which checks them.
    """

    command: PushPiece
    handle: SignedHandle
    digests: dict[int, dict[int, int]] = field(default_factory=dict)
    is_checked: bool = False


class TransferDesk:
    """Acts on the commands of the scheduler, and answers it with exactly one end of each piece."""

    def __init__(
        self,
        group: KVGroup,
        workers: Sequence[KVWorker],
        scheduler: DisaggregatedScheduler,
        clock: Callable[[], float],
        cancel_seconds: float,
    ) -> None:
        """A worker that does not stop a piece within `cancel_seconds` is killed."""
        self._key, self._parts = group.key, group.parts()
        self._workers, self._scheduler = workers, scheduler
        self._clock, self._cancel_seconds = clock, cancel_seconds
        self._pieces: dict[PieceId, _Piece] = {}
        self._stopping: dict[PieceId, tuple[float, set[tuple[int, int]]]] = {}

    @property
    def num_pieces(self) -> int:
        """The pieces that are being copied."""
        return len(self._pieces)

    # --- commands ---

    def push(self, command: PushPiece, step: int = 0) -> None:
        """Lets the source copy a piece, with `step` layer by layer while it executes the order of this number."""
        piece = command.piece
        source = End(command.source, command.epochs[0], list(piece.source_blocks))
        target = End(command.target, command.epochs[1], list(piece.target_blocks))
        handle = sign(Handle(piece.request_id, piece.attempt, piece.start, piece.num_tokens, source, target), self._key)
        self._pieces[command.id] = _Piece(command, handle)
        self._workers[command.source].send(PushKV(handle, self._workers[command.target].addresses, step))

    def cancel(self, command: CancelPiece) -> None:
        ranks = {(worker, rank) for worker in command.workers for rank in range(len(self._parts[worker]))}
        self._stopping[command.id] = self._clock() + self._cancel_seconds, ranks
        for worker in command.workers:
            self._workers[worker].send(CancelKV(PieceKey(*command.id)))
        if not ranks:
            self._end(command.id)

    def kill_silent(self) -> None:
        """Kills workers that have not stopped a piece in time."""
        now = self._clock()
        for deadline, ranks in self._stopping.values():
            for worker, _ in ranks if now > deadline else ():
                self._workers[worker].kill("it does not stop a copy of KV; it hangs")

    # --- reports ---

    def take(self, worker: int, report: Report) -> None:
        """Acts on the report of a rank of a worker. Late and unknown ones change nothing."""
        piece_id = PieceId(*report.key)
        if report.kind == "stopped":
            self._take_stopped(piece_id, worker, report.rank)
            return
        piece = self._pieces.get(piece_id)
        if piece is None:
            return
        is_source = worker == piece.command.source
        self._renew(piece_id, piece, "source" if is_source else "target")
        if report.kind == "pushed" and is_source:
            piece.digests[report.rank] = report.digests
            if len(piece.digests) == len(self._parts[worker]):
                self._check(piece)
        elif report.kind == "received" and not is_source:
            self._scheduler.received(piece_id, report.rank)
        elif report.kind == "failed":
            LOG.warning("KV of request %s: worker %d: %s", piece_id.request_id, worker, report.reason)
            if piece_id not in self._stopping:
                self.cancel(CancelPiece(piece_id, (piece.command.source, piece.command.target)))

    def _renew(self, piece_id: PieceId, piece: _Piece, end: LeaseEnd) -> None:
        """One end is at work on a piece. If it is its turn, nothing can be expected of the other one."""
        self._scheduler.renew(piece_id, end)
        turn: tuple[LeaseEnd, LeaseEnd] = ("target", "source") if piece.is_checked else ("source", "target")
        if end == turn[0]:
            self._scheduler.renew(piece_id, turn[1])

    def _check(self, piece: _Piece) -> None:
        piece.is_checked = True
        source, target = piece.command.source, piece.command.target
        digests: list[list[int]] = [[] for _ in self._parts[target]]
        for route in routes_between(self._parts[source], self._parts[target]):
            digests[route.target].append(piece.digests[route.source][route.target])
        self._workers[target].send(CheckKV(piece.handle, digests))

    def _take_stopped(self, piece_id: PieceId, worker: int, rank: int) -> None:
        if piece_id not in self._stopping:
            return
        _, ranks = self._stopping[piece_id]
        ranks.discard((worker, rank))
        if not ranks:
            self._end(piece_id)

    def _end(self, piece_id: PieceId) -> None:
        del self._stopping[piece_id]
        self._pieces.pop(piece_id, None)
        self._scheduler.stopped(piece_id)

    def renew(self, worker: int) -> None:
        """A worker has shown life, which renews its end of the pieces to it."""
        for piece_id, piece in self._pieces.items():
            if piece.command.target == worker:
                self._scheduler.renew(piece_id, "target")

    def forget_arrived(self, is_in_flight: Callable[[PieceId], bool]) -> None:
        """Forgets pieces that the scheduler does not wait for."""
        for piece_id in [one for one in self._pieces if one not in self._stopping and not is_in_flight(one)]:
            del self._pieces[piece_id]

    def lose(self, worker: int) -> None:
        """A worker is lost: it will not answer."""
        for piece_id, (_, ranks) in list(self._stopping.items()):
            ranks -= {one for one in ranks if one[0] == worker}
            if not ranks:
                self._end(piece_id)
