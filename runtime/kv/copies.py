"""Records that the KV manager returns: block copies for the engine, tables of admitted sequences, statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A copy of one block of the device pool to another, before the step writes to either."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class TierCopy:
    """A copy of the KV of a sequence's first `num_tokens` tokens from one tier to another: block i to block i.

    A copy to the device runs before the batches of its step. The blocks on both sides stay pinned until it is finished
    or aborted.
    """

    seq_id: str
    source: Tier
    target: Tier
    source_blocks: Sequence[int]
    target_blocks: Sequence[int]
    num_tokens: int


class Admission(NamedTuple):
    """The table of an admitted sequence, `hit_blocks` then `new_blocks`; `num_cached_tokens` are not computed again.

    `taken_blocks` are the blocks of the table without an owner before: idle hits and new blocks.
    """

    num_cached_tokens: int
    hit_blocks: list[int]
    new_blocks: list[int]
    taken_blocks: list[int]


class Fork(NamedTuple):
    """The new blocks in a fork's table, and the copies (at most one) that it requires."""

    new_blocks: list[int]
    copies: list[BlockCopy]


@dataclass(frozen=True, slots=True)
class KVStats:
    """Sizes now (`num_*`, in blocks) and counters since the start.

    `num_free` + `num_used` + `num_cached` + `num_in_transfer` == `num_blocks`; `num_free` and `num_blocks` are None if
    the pool is unbounded. `num_lower_used` of the used blocks, and of those in transfer, lie in the tier below;
    `total_promoted` blocks have moved from it to the device.
    """

    num_blocks: int | None
    num_free: int | None
    num_used: int
    num_cached: int
    num_in_transfer: int
    num_lower_used: int
    num_host_used: int
    num_disk_used: int
    total_queried_tokens: int
    total_hit_tokens: int
    total_evictions: int
    total_swaps_out: int
    total_swaps_in: int
    total_forks: int
    total_promoted: int = 0
