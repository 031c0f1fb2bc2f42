"""Block tables of all sequences in one paged KV pool (PagedAttention, arXiv 2309.06180).

The protocol is `can_admit` -> `admit` -> `allocate` or `take_blocks` (repeated while the sequence grows) -> `free`. A
sequence is any string id; the scheduler uses request ids. Tables are owned by the manager and only read elsewhere,
except that the caller of `take_blocks` appends the blocks.

Sequences with equal beginnings share blocks, by the prefix cache (`track`, `publish`) and by `fork`. Only full blocks
are shared, and full blocks are never written to. Sequences can be swapped to the tiers below the device and back.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from sageLLM.runtime.kv.block_pool import BlockPool
from sageLLM.runtime.kv.copies import Admission, BlockCopy, Fork, KVStats, TierCopy
from sageLLM.runtime.kv.events import KVEventLog
from sageLLM.runtime.kv.hash_chain import HashChain
from sageLLM.runtime.kv.lower_tier import TwoTierPool
from sageLLM.runtime.kv.prefix_cache import PrefixCache
from sageLLM.runtime.kv.swap import SwapSpace

DEFAULT_BLOCK_SIZE = 16


class PagedKVManager:
    """Block tables over a pool of `num_blocks` (None: unbounded) blocks of `block_size` tokens.

    `lower_blocks` are further blocks in a tier below, used by running sequences when the others are all in use.
    `host_blocks` and `disk_blocks` are the sizes of the swap tiers.
    """

    def __init__(
        self,
        num_blocks: int | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        *,
        enable_prefix_caching: bool = False,
        lower_blocks: int = 0,
        host_blocks: int = 0,
        disk_blocks: int = 0,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks) if not lower_blocks else TwoTierPool(num_blocks or 0, lower_blocks)
        self.enable_prefix_caching = enable_prefix_caching
        self._tables: dict[str, list[int]] = {}
        self._prefixes = PrefixCache(self.pool, block_size)
        self._swap = SwapSpace(host_blocks, disk_blocks)
        # Freed blocks that a pending step may still read or write, with the number of that step, oldest first.
        self._pending_free: deque[tuple[int, list[int]]] = deque()
        self._total_forks = 0
        self._total_promoted = 0

    @property
    def max_tokens(self) -> int | None:
        """The number of tokens that the pool holds; None if it is unbounded."""
        return None if self.pool.num_blocks is None else self.pool.num_blocks * self.block_size

    @property
    def has_lower_tier(self) -> bool:
        """Whether tables may have blocks in a tier below the device."""
        return isinstance(self.pool, TwoTierPool)

    @property
    def num_available(self) -> int | None:
        """The number of blocks that can be allocated now, idle cached ones included; None if the pool is unbounded."""
        return self.pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks for `num_tokens` tokens of one sequence; the last block may be partial."""
        return -(-num_tokens // self.block_size)

    def holds(self, seq_id: str) -> bool:
        """Whether the sequence has a table."""
        return seq_id in self._tables

    def block_table(self, seq_id: str) -> list[int]:
        """The live table of a sequence, read-only for the caller: token `t` is in block `table[t // block_size]`."""
        return self._tables[seq_id]

    # --- growing ---

    def num_missing_blocks(self, seq_id: str, num_tokens: int) -> int:
        """The number of blocks to add until the sequence's table covers `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(self._tables.get(seq_id, ())))

    def can_allocate(self, seq_id: str, num_tokens: int, headroom: int = 0) -> bool:
        """Whether `allocate(seq_id, num_tokens)` would succeed and leave at least `headroom` blocks free."""
        return self.pool.can_take(self.num_missing_blocks(seq_id, num_tokens) + headroom)

    def allocate(self, seq_id: str, num_tokens: int) -> list[int]:
        """Extends the sequence's table to cover `num_tokens` tokens; returns the new blocks."""
        new_blocks = self.pool.take(self.num_missing_blocks(seq_id, num_tokens))
        self._tables.setdefault(seq_id, []).extend(new_blocks)
        return new_blocks

    def take_blocks(self, num: int) -> list[int] | None:
        """Takes blocks that the caller appends to tables (`block_table`) at once; None if too few are free."""
        return self.pool.take(num) if self.pool.can_take(num) else None

    # --- the prefix cache ---

    def track(self, seq_id: str, prompt: Sequence[int], outputs: Sequence[int], salt: str = "") -> None:
        """Registers a sequence's live token lists with the prefix cache; they may only grow at the end.

        Nothing is hashed until the sequence is matched or published. Sequences with different salts share no blocks.
        """
        if self.enable_prefix_caching:
            self._prefixes.track(seq_id, prompt, outputs, salt)

    def forget(self, seq_id: str) -> None:
        """Ends `track`. The sequence's published blocks can still be found."""
        self._prefixes.forget(seq_id)

    def num_cached_tokens(self, seq_id: str) -> int:
        """The number of leading tokens that `admit` would find cached now.

        It is a multiple of the block size and less than the sequence's length: the last token is always computed.
        """
        return len(self._prefixes.match(seq_id)) * self.block_size

    def num_matching_tokens(self, chain: HashChain) -> int:
        """As `num_cached_tokens`, for a sequence that is not tracked; its chain has this pool's block size."""
        return self._prefixes.num_matching(chain) * self.block_size if self.enable_prefix_caching else 0

    def can_admit(self, seq_id: str, num_tokens: int, headroom: int = 0) -> bool:
        """Whether `admit(seq_id, num_tokens)` would succeed and leave at least `headroom` blocks free."""
        hits = self._hits(seq_id, num_tokens)
        num_taken = self.blocks_for(num_tokens) - len(hits) + (self.pool.count_idle(hits) if hits else 0)
        return self.pool.can_take(num_taken + headroom)

    def admit(self, seq_id: str, num_tokens: int) -> Admission:
        """Creates a sequence's table for `num_tokens` tokens, beginning with its blocks in the prefix cache."""
        assert seq_id not in self._tables, f"{seq_id!r} is admitted twice"
        hits = self._hits(seq_id, num_tokens)
        taken_hits = self.pool.share(hits) if hits else []
        new_blocks = self.pool.take(self.blocks_for(num_tokens) - len(hits))
        self._tables[seq_id] = hits + new_blocks
        self._prefixes.count_query(seq_id, len(hits))
        return Admission(len(hits) * self.block_size, hits, new_blocks, taken_hits + new_blocks)

    def _hits(self, seq_id: str, num_tokens: int) -> list[int]:
        return self._prefixes.match(seq_id)[: self.blocks_for(num_tokens)]

    def publish(self, seq_id: str, num_computed_tokens: int) -> None:
        """Makes the full blocks of the first `num_computed_tokens` tokens visible to other sequences.

        Costs O(blocks filled since the last call), mostly without hashing them. Call it after a prefill chunk and when
        the sequence ends, not in every decode step. Never call it for tokens of a step that is not committed: a hit
        would read unwritten KV.
        """
        table = self._tables.get(seq_id)
        if table is not None:
            self._prefixes.publish(seq_id, table, num_computed_tokens)

    def record_prefixes(self, log: KVEventLog) -> None:
        """Logs the blocks that other sequences can find, from now on."""
        self._prefixes.record(log)

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache, for example because the weights changed."""
        self._prefixes.reset()

    # --- leaving ---

    def free(self, seq_id: str, until_step: int | None = None) -> list[int]:
        """Drops the sequence's table; returns the blocks without an owner now.

        With `until_step` the blocks stay in use until `end_step` of that step, because a pending step may still write
        to them. A swapped sequence releases its tier blocks; one that is being copied releases everything when the copy
        ends (`finish_swap` or `abort_swap`). An unknown sequence frees nothing.
        """
        is_pinned = self._swap.forget(seq_id)
        blocks = self._tables.pop(seq_id, [])
        self._prefixes.drop_table(seq_id)
        if is_pinned or not blocks:
            return []
        if until_step is None:
            return self.pool.release(blocks)
        assert not self._pending_free or self._pending_free[-1][0] <= until_step, (
            "pending frees must be added in the order of steps"
        )
        self._pending_free.append((until_step, blocks))
        return []

    def end_step(self, step_id: int) -> list[int]:
        """Releases the blocks with a free pending until step `step_id` or an earlier one."""
        ownerless: list[int] = []
        while self._pending_free and self._pending_free[0][0] <= step_id:
            ownerless += self.pool.release(self._pending_free.popleft()[1])
        return ownerless

    # --- forking ---

    def can_fork(self, parent_id: str, num_tokens: int) -> bool:
        """Whether the parent has a table and the pool a block for the tokens after the last full block."""
        return parent_id in self._tables and self.pool.can_take(int(num_tokens % self.block_size > 0))

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> Fork:
        """Creates a table for `child_id` with the parent's first `num_tokens` tokens.

        Full blocks are shared. A partial last block is copied, because both sequences will write to it.
        """
        assert child_id not in self._tables, f"{child_id!r} has a table already"
        parent = self._tables[parent_id]
        num_full = num_tokens // self.block_size
        new_blocks = self.pool.take(int(num_tokens % self.block_size > 0))
        self.pool.share(parent[:num_full])
        self._tables[child_id] = parent[:num_full] + new_blocks
        self._total_forks += 1
        return Fork(new_blocks, [BlockCopy(parent[num_full], block) for block in new_blocks])

    # --- two tiers of running sequences ---

    def promote(self, seq_ids: Iterable[str], limit: int, until_step: int) -> dict[str, list[BlockCopy]]:
        """Moves up to `limit` blocks of these sequences from the tier below to free blocks of the device.

        The tables change at once: the copies must run before step `until_step`, at the end of which the lower blocks
        are released. Blocks that sequences share stay. Returns the copies by sequence.
        """
        pool, found = self.pool, dict[str, list[BlockCopy]]()
        if not isinstance(pool, TwoTierPool) or not pool.num_lower_used:
            return found
        left = min(limit, pool.num_upper_free)
        for seq_id in seq_ids:
            if left == 0:
                break
            table = self._tables[seq_id]
            copies = []
            for place in pool.movable(table)[:left]:
                copies.append(BlockCopy(table[place], pool.move_up(table[place])))
                table[place] = copies[-1].target
            if copies:
                found[seq_id] = copies
                self._pending_free.append((until_step, [copy.source for copy in copies]))
                left -= len(copies)
        self._total_promoted += sum(map(len, found.values()))
        return found

    # --- swapping ---

    @property
    def num_pending_free_blocks(self) -> int:
        """The number of blocks that become free when the pending copies out and the pending steps end."""
        transfers = self._swap.transfers.values()
        leaving = [t.device_blocks for t in transfers if t.direction == "out" or t.is_orphan]
        leaving += [blocks for _, blocks in self._pending_free]
        return sum(self.pool.num_owners(block) == 1 for blocks in leaving for block in blocks)

    def is_swapped(self, seq_id: str) -> bool:
        """Whether the sequence's KV is in a tier, complete and without a pending copy."""
        return seq_id in self._swap.swapped

    def is_in_transfer(self, seq_id: str) -> bool:
        """Whether a copy of the sequence is pending."""
        return seq_id in self._swap.transfers

    def begin_swap_out(self, seq_id: str, num_computed_tokens: int) -> TierCopy | None:
        """Reserves tier blocks for the sequence's computed tokens; None if no tier has room or nothing is computed."""
        num_blocks = self.blocks_for(num_computed_tokens)
        return self._swap.begin_out(seq_id, self._tables[seq_id], num_blocks, num_computed_tokens)

    def can_swap_in(self, seq_id: str, num_tokens: int, headroom: int = 0) -> bool:
        """Whether the sequence is swapped and `begin_swap_in` would leave at least `headroom` blocks free."""
        return self.is_swapped(seq_id) and self.pool.can_take(self.blocks_for(num_tokens) + headroom)

    def begin_swap_in(self, seq_id: str, num_tokens: int) -> TierCopy:
        """Creates a table for `num_tokens` tokens of a swapped sequence and starts the copy into it.

        `num_tokens` is at least the number of swapped tokens.
        """
        assert seq_id not in self._tables, f"{seq_id!r} has a table already"
        assert num_tokens >= self._swap.swapped[seq_id].num_tokens, "the table is too short for the swapped tokens"
        self._tables[seq_id] = self.pool.take(self.blocks_for(num_tokens))
        return self._swap.begin_in(seq_id, self._tables[seq_id])

    def finish_swap(self, seq_id: str) -> list[int]:
        """Commits a copy that has arrived: releases its source. Returns the device blocks without an owner now."""
        return self._end_swap(seq_id, arrived=True)

    def abort_swap(self, seq_id: str) -> list[int]:
        """Rolls back a copy that failed: releases its target. Returns the device blocks without an owner now."""
        return self._end_swap(seq_id, arrived=False)

    def _end_swap(self, seq_id: str, arrived: bool) -> list[int]:
        transfer = self._swap.end(seq_id, arrived)
        stays_on_device = arrived == (transfer.direction == "in")
        if transfer.is_orphan:
            return self.pool.release(transfer.device_blocks)
        if stays_on_device:
            return []
        self._prefixes.drop_table(seq_id)
        return self.pool.release(self._tables.pop(seq_id))

    # --- reports ---

    def stats(self) -> KVStats:
        """Sizes now and counters since the start."""
        pool, prefixes, swap = self.pool, self._prefixes, self._swap
        num_moving = len({block for t in swap.transfers.values() for block in t.device_blocks})
        return KVStats(
            num_blocks=pool.num_blocks,
            num_free=None if pool.num_free is None else pool.num_free - pool.num_idle,
            num_used=pool.num_used - num_moving,
            num_cached=pool.num_idle,
            num_in_transfer=num_moving,
            num_lower_used=pool.num_lower_used if isinstance(pool, TwoTierPool) else 0,
            num_host_used=swap.num_used("host"),
            num_disk_used=swap.num_used("disk"),
            total_queried_tokens=prefixes.total_queried_tokens,
            total_hit_tokens=prefixes.total_hit_tokens,
            total_evictions=pool.total_evictions,
            total_swaps_out=swap.total_out,
            total_swaps_in=swap.total_in,
            total_forks=self._total_forks,
            total_promoted=self._total_promoted,
        )

    def check_integrity(self, live: Iterable[str] | None = None) -> None:
        """Checks that tables, pool and tiers are consistent, and that tables share prefixes only.

        `live`, if passed, names all sequences with a table.
        """
        self.pool.check_integrity()
        self._swap.check_integrity()
        num_owners = Counter(block for blocks in self._all_owned() for block in blocks)
        for table in self._tables.values():
            assert len(set(table)) == len(table), "a block is twice in a table"
        for block, num in num_owners.items():
            counted = self.pool.num_owners(block)
            assert num == counted, f"block {block} has {num} owners, and the pool counts {counted}"
        num_owned = len(num_owners)
        assert num_owned == self.pool.num_used, f"{self.pool.num_used} blocks used, {num_owned} of them in tables"
        self._check_sharing(num_owners)
        if live is not None:
            assert self._tables.keys() == set(live), (
                f"tables without owner, or owners without table: {self._strays(live)}"
            )

    def _all_owned(self) -> list[list[int]]:
        orphans = [t.device_blocks for t in self._swap.transfers.values() if t.is_orphan]
        return [*self._tables.values(), *orphans, *(blocks for _, blocks in self._pending_free)]

    def _check_sharing(self, num_owners: Counter[int]) -> None:
        """Checks that a shared block has the same index in all its tables, as part of a common prefix.

        The blocks before it can differ: two sequences may have computed equal tokens concurrently, in separate blocks.
        """
        index_of: dict[int, int] = {}
        for table in self._all_owned():
            for index, block in enumerate(table):
                if num_owners[block] > 1:
                    assert index_of.setdefault(block, index) == index, f"block {block} is shared beyond a prefix"

    def _strays(self, live: Iterable[str]) -> list[str]:
        return sorted(self._tables.keys() ^ set(live))
