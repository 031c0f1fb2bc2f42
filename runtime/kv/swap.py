"""Two-phase swapping of sequences between the device pool and the host and disk tiers.

`begin_out` and `begin_in` reserve the target blocks, pin the source blocks, and return the copy for the engine. `end`
releases the source if the copy has arrived, else the target. A block is therefore never reused while a copy may still
read or write it, whether the copy succeeds, fails, or is overtaken by an abort of its request.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sageLLM.runtime.kv.block_pool import BlockPool
from sageLLM.runtime.kv.copies import Tier, TierCopy


class SwappedKV(NamedTuple):
    """A sequence's KV in a tier."""

    tier: Tier
    blocks: list[int]
    num_tokens: int


@dataclass(slots=True)
class Transfer:
    """A pending copy between a device table and a tier. `is_orphan`: its sequence was freed in the meantime."""

    direction: Literal["out", "in"]
    device_blocks: list[int]
    swapped: SwappedKV
    is_orphan: bool = False


class SwapSpace:
    """The tiers below the device, in the order in which they are tried, and the pending copies."""

    def __init__(self, host_blocks: int, disk_blocks: int) -> None:
        if host_blocks < 0 or disk_blocks < 0:
            raise ValueError(
                f"tiers must have at least 0 blocks, got {host_blocks} on the host and {disk_blocks} on disk"
            )
        sizes: dict[Tier, int] = {"host": host_blocks, "disk": disk_blocks}
        self.pools = {tier: BlockPool(size) for tier, size in sizes.items() if size}
        self.swapped: dict[str, SwappedKV] = {}
        self.transfers: dict[str, Transfer] = {}
        self.total_out = 0
        self.total_in = 0

    def num_used(self, tier: Tier) -> int:
        """The number of blocks in use in a tier."""
        return self.pools[tier].num_used if tier in self.pools else 0

    def begin_out(self, seq_id: str, table: list[int], num_blocks: int, num_tokens: int) -> TierCopy | None:
        """Reserves tier blocks for the first `num_blocks` blocks of a device table; None if no tier has room."""
        assert seq_id not in self.transfers and seq_id not in self.swapped, f"{seq_id!r} is swapped twice"
        # A sequence goes to one tier as a whole: splitting it would need two copies with a common end.
        tier = next((tier for tier, pool in self.pools.items() if pool.can_take(num_blocks)), None)
        if tier is None or num_blocks == 0:
            return None
        swapped = SwappedKV(tier, self.pools[tier].take(num_blocks), num_tokens)
        self.transfers[seq_id] = Transfer("out", table, swapped)
        return TierCopy(seq_id, "device", tier, table[:num_blocks], list(swapped.blocks), num_tokens)

    def begin_in(self, seq_id: str, table: list[int]) -> TierCopy:
        """Starts the copy of a swapped sequence into a device table."""
        assert seq_id not in self.transfers, f"{seq_id!r} is being copied already"
        swapped = self.swapped.pop(seq_id)
        self.transfers[seq_id] = Transfer("in", table, swapped)
        targets = table[: len(swapped.blocks)]
        return TierCopy(seq_id, swapped.tier, "device", list(swapped.blocks), targets, swapped.num_tokens)

    def end(self, seq_id: str, arrived: bool) -> Transfer:
        """Ends a transfer on the tier's side; the caller releases the blocks on the device's side."""
        transfer = self.transfers.pop(seq_id)
        # KV stays in the tier after a copy out that arrived or a copy in that failed, if its sequence still exists.
        stays = arrived == (transfer.direction == "out") and not transfer.is_orphan
        if stays:
            self.swapped[seq_id] = transfer.swapped
        else:
            self._release(transfer.swapped)
        if arrived:
            self.total_out += transfer.direction == "out"
            self.total_in += transfer.direction == "in"
        return transfer

    def forget(self, seq_id: str) -> bool:
        """Drops a sequence. True if a pending copy pins its device blocks; they are then released when it ends."""
        if seq_id in self.transfers:
            self.transfers[seq_id].is_orphan = True
            return True
        if seq_id in self.swapped:
            self._release(self.swapped.pop(seq_id))
        return False

    def _release(self, swapped: SwappedKV) -> None:
        self.pools[swapped.tier].release(swapped.blocks)

    def check_integrity(self) -> None:
        """Checks that every used block of a tier belongs to exactly one swapped or moving sequence."""
        owned: dict[Tier, list[int]] = {tier: [] for tier in self.pools}
        for swapped in [*self.swapped.values(), *(transfer.swapped for transfer in self.transfers.values())]:
            owned[swapped.tier] += swapped.blocks
        for tier, pool in self.pools.items():
            pool.check_integrity()
            assert len(set(owned[tier])) == len(owned[tier]), f"a block of the {tier} tier has two owners"
            assert len(owned[tier]) == pool.num_used, f"a block of the {tier} tier is used without an owner"
        assert self.swapped.keys().isdisjoint(self.transfers), "a sequence is both swapped and in transfer"
