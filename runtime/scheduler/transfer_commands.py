"""Commands of the group scheduler to copy KV between workers, and the blocks at both ends of a transfer."""

from dataclasses import dataclass
from typing import NamedTuple

from sageLLM.runtime.scheduler.batch import KVMigration
from sageLLM.runtime.scheduler.member import Member


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
        return id_of(self.piece)


@dataclass(frozen=True, slots=True)
class CancelPiece:
    """Command: stop a piece on these workers, and answer with `stopped` when all have."""

    id: PieceId
    workers: tuple[int, ...]


Command = PushPiece | CancelPiece


def id_of(piece: KVMigration) -> PieceId:
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
