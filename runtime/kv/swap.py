"""Moves sequences between the device pool and the host and disk tiers, in two phases.

`begin_*` reserves the target and pins the source; the copy is announced to the engine; `finish` releases the source,
`abort` the target. So a block is never reused while a copy may still read or write it, whatever becomes of the copy.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sageLLM.runtime.kv.block_pool import BlockPool
from sageLLM.runtime.kv.copies import Tier, TierCopy


class Resting(NamedTuple):
    """A sequence's KV in a tier."""

    tier: Tier
    blocks: list[int]
    num_tokens: int


@dataclass(slots=True)
class Transfer:
    """A copy under way between a device table and a tier. `is_orphan`: its sequence was freed in the meantime."""

    direction: Literal["out", "in"]
    device_blocks: list[int]
    resting: Resting
    is_orphan: bool = False


class SwapSpace:
    """The tiers below the device, tried in their order, and the copies under way."""

    def __init__(self, host_blocks: int, disk_blocks: int) -> None:
        if host_blocks < 0 or disk_blocks < 0:
            raise ValueError(f"a tier has at least 0 blocks, got {host_blocks} on the host and {disk_blocks} on disk")
        sizes: dict[Tier, int] = {"host": host_blocks, "disk": disk_blocks}
        self.pools = {tier: BlockPool(size) for tier, size in sizes.items() if size}
        self.resting: dict[str, Resting] = {}
        self.transfers: dict[str, Transfer] = {}
        self.total_out = 0
        self.total_in = 0

    def num_used(self, tier: Tier) -> int:
        """Blocks in use in a tier."""
        return self.pools[tier].num_used if tier in self.pools else 0

    def begin_out(self, seq_id: str, table: list[int], num_blocks: int, num_tokens: int) -> TierCopy | None:
        """Reserve room for the first `num_blocks` blocks of a device table; None when no tier has it."""
        assert seq_id not in self.transfers and seq_id not in self.resting, f"{seq_id!r} is swapped twice"
        tier = next((tier for tier, pool in self.pools.items() if pool.can_take(num_blocks)), None)
        if tier is None or num_blocks == 0:
            return None
        resting = Resting(tier, self.pools[tier].take(num_blocks), num_tokens)
        self.transfers[seq_id] = Transfer("out", table, resting)
        return TierCopy(seq_id, "device", tier, table[:num_blocks], list(resting.blocks), num_tokens)

    def begin_in(self, seq_id: str, table: list[int]) -> TierCopy:
        """Announce the copy of a resting sequence into a device table."""
        assert seq_id not in self.transfers, f"{seq_id!r} is copied already"
        resting = self.resting.pop(seq_id)
        self.transfers[seq_id] = Transfer("in", table, resting)
        targets = table[: len(resting.blocks)]
        return TierCopy(seq_id, resting.tier, "device", list(resting.blocks), targets, resting.num_tokens)

    def end(self, seq_id: str, arrived: bool) -> Transfer:
        """Settle the tier's side of a transfer; the caller settles the device's side."""
        transfer = self.transfers.pop(seq_id)
        rests = arrived == (transfer.direction == "out") and not transfer.is_orphan
        if rests:
            self.resting[seq_id] = transfer.resting
        else:
            self._release(transfer.resting)
        if arrived:
            self.total_out += transfer.direction == "out"
            self.total_in += transfer.direction == "in"
        return transfer

    def forget(self, seq_id: str) -> bool:
        """Drop a sequence; True when a copy still pins its device blocks, which then go back when that ends."""
        if seq_id in self.transfers:
            self.transfers[seq_id].is_orphan = True
            return True
        if seq_id in self.resting:
            self._release(self.resting.pop(seq_id))
        return False

    def _release(self, resting: Resting) -> None:
        self.pools[resting.tier].give_back(resting.blocks)

    def check_integrity(self) -> None:
        """Check that every tier's used blocks belong to just one resting or moving sequence."""
        owned: dict[Tier, list[int]] = {tier: [] for tier in self.pools}
        for resting in [*self.resting.values(), *(transfer.resting for transfer in self.transfers.values())]:
            owned[resting.tier] += resting.blocks
        for tier, pool in self.pools.items():
            pool.check_integrity()
            assert len(set(owned[tier])) == len(owned[tier]), f"a block of the {tier} tier has two owners"
            assert len(owned[tier]) == pool.num_used, f"a block of the {tier} tier is used and has no owner"
        assert self.resting.keys().isdisjoint(self.transfers), "a sequence rests and moves"
