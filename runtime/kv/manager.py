"""Keeps the block table of every sequence in one paged KV pool (PagedAttention, arXiv 2309.06180).

The protocol is `can_admit` -> `admit` -> `allocate` or `append_blocks` (again and again while the sequence grows) ->
`free`. A sequence is any string id; the scheduler uses request ids. Tables are owned here and only read elsewhere.

Blocks are shared where sequences have equal beginnings: by the prefix cache (`track`, `publish`) and by `fork`. Only
full blocks are shared, and nobody writes to a full block. Sequences can be moved to the tiers of a swap space and back.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from sageLLM.runtime.kv.block_pool import BlockPool
from sageLLM.runtime.kv.copies import Admission, BlockCopy, Fork, KVStats, TierCopy
from sageLLM.runtime.kv.prefix_cache import PrefixCache
from sageLLM.runtime.kv.swap import SwapSpace

DEFAULT_BLOCK_SIZE = 16


class PagedKVManager:
    """Block tables over a pool of `num_blocks` (None: unbounded) blocks of `block_size` tokens.

    `host_blocks` and `disk_blocks` are the sizes of the tiers that sequences can be swapped to.
    """

    def __init__(
        self,
        num_blocks: int | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        *,
        enable_prefix_caching: bool = False,
        host_blocks: int = 0,
        disk_blocks: int = 0,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.enable_prefix_caching = enable_prefix_caching
        self._tables: dict[str, list[int]] = {}
        self._prefixes = PrefixCache(self.pool, block_size)
        self._swap = SwapSpace(host_blocks, disk_blocks)
        # Freed blocks that a step in flight may still touch, with that step, the oldest first.
        self._deferred: deque[tuple[int, list[int]]] = deque()
        self._total_forks = 0

    @property
    def max_tokens(self) -> int | None:
        """Tokens that the empty pool holds; None when it is unbounded."""
        return None if self.pool.num_blocks is None else self.pool.num_blocks * self.block_size

    @property
    def num_available(self) -> int | None:
        """Blocks that can be allocated now, cached ones that nobody uses among them; None when unbounded."""
        return self.pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def holds(self, seq_id: str) -> bool:
        """Whether the sequence has a table here."""
        return seq_id in self._tables

    def block_table(self, seq_id: str) -> list[int]:
        """The live table of a sequence: token `t` lies in block `table[t // block_size]`. Read it, do not change it."""
        return self._tables[seq_id]

    # --- growing ---

    def num_missing_blocks(self, seq_id: str, num_tokens: int) -> int:
        """Blocks to add before the sequence's table covers `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(self._tables.get(seq_id, ())))

    def can_allocate(self, seq_id: str, num_tokens: int, headroom: int = 0) -> bool:
        """Whether `allocate(seq_id, num_tokens)` would succeed and leave at least `headroom` blocks free."""
        return self.pool.can_take(self.num_missing_blocks(seq_id, num_tokens) + headroom)

    def allocate(self, seq_id: str, num_tokens: int) -> list[int]:
        """Extend the sequence's table to cover `num_tokens` tokens and return the blocks that are new in it."""
        new_blocks = self.pool.take(self.num_missing_blocks(seq_id, num_tokens))
        self._tables.setdefault(seq_id, []).extend(new_blocks)
        return new_blocks

    def append_blocks(self, seq_ids: Sequence[str]) -> list[int] | None:
        """Extend the table of each of these sequences by one block, in one go; None, and no change, if too few are
        free.
        """
        if not self.pool.can_take(len(seq_ids)):
            return None
        blocks = self.pool.take(len(seq_ids))
        for seq_id, block in zip(seq_ids, blocks, strict=True):
            self._tables[seq_id].append(block)
        return blocks

    # --- the prefix cache ---

    def track(self, seq_id: str, prompt: Sequence[int], outputs: Sequence[int], salt: str = "") -> None:
        """Tell the prefix cache a sequence's tokens, as live lists that may only grow at the end.

        Costs nothing until the sequence is matched or published. Sequences of different `salt` share nothing.
        """
        if self.enable_prefix_caching:
            self._prefixes.track(seq_id, prompt, outputs, salt)

    def forget(self, seq_id: str) -> None:
        """End what `track` began. The sequence's published blocks stay findable."""
        self._prefixes.forget(seq_id)

    def num_cached_tokens(self, seq_id: str) -> int:
        """Tokens of the sequence's beginning that `admit` would find cached now.

        A multiple of the block size and less than the sequence's length, as its last token is always computed.
        """
        return len(self._prefixes.match(seq_id)) * self.block_size

    def can_admit(self, seq_id: str, num_tokens: int, headroom: int = 0) -> bool:
        """Whether `admit(seq_id, num_tokens)` would succeed and leave at least `headroom` blocks free."""
        hits = self._hits(seq_id, num_tokens)
        num_taken = self.blocks_for(num_tokens) - len(hits) + self.pool.count_idle(hits)
        return self.pool.can_take(num_taken + headroom)

    def admit(self, seq_id: str, num_tokens: int) -> Admission:
        """Give a sequence a table for `num_tokens` tokens, which begins with the blocks that the cache has of it."""
        assert seq_id not in self._tables, f"{seq_id!r} is admitted twice"
        hits = list(self._hits(seq_id, num_tokens))
        taken_hits = self.pool.share(hits)
        new_blocks = self.pool.take(self.blocks_for(num_tokens) - len(hits))
        self._tables[seq_id] = hits + new_blocks
        self._prefixes.count_query(seq_id, len(hits))
        return Admission(len(hits) * self.block_size, hits, new_blocks, taken_hits + new_blocks)

    def _hits(self, seq_id: str, num_tokens: int) -> list[int]:
        return self._prefixes.match(seq_id)[: self.blocks_for(num_tokens)]

    def publish(self, seq_id: str, num_computed_tokens: int) -> None:
        """Let other sequences find the blocks that the first `num_computed_tokens` tokens fill.

        Costs O(blocks filled since the last call), so it belongs to the end of a prefill chunk and of a sequence; a
        decode that stays within its block needs none.
        """
        table = self._tables.get(seq_id)
        if table is not None:
            self._prefixes.publish(seq_id, table, num_computed_tokens)

    def reset_prefix_cache(self) -> None:
        """Let nothing computed so far be found any more, say because the weights changed."""
        self.pool.forget_labels()

    # --- leaving ---

    def free(self, seq_id: str, until_step: int | None = None) -> list[int]:
        """Forget the sequence's table; returns the blocks that nobody uses any more.

        With `until_step` the blocks stay in use until `end_step` of that step, for a step in flight may touch them. A
        swapped sequence gives back its room in the tier; one that is being copied gives back everything when the copy
        ends (`finish_swap` or `abort_swap`). A sequence that is not known frees nothing.
        """
        is_pinned = self._swap.forget(seq_id)
        blocks = self._tables.pop(seq_id, [])
        self._prefixes.lose_table(seq_id)
        if is_pinned or not blocks:
            return []
        if until_step is None:
            return self.pool.give_back(blocks)
        assert not self._deferred or self._deferred[-1][0] <= until_step, "deferred frees come in the order of steps"
        self._deferred.append((until_step, blocks))
        return []

    def end_step(self, step_id: int) -> list[int]:
        """Step `step_id` and those before it are over: give back what was freed until then."""
        ownerless: list[int] = []
        while self._deferred and self._deferred[0][0] <= step_id:
            ownerless += self.pool.give_back(self._deferred.popleft()[1])
        return ownerless

    # --- forking ---

    def can_fork(self, parent_id: str, num_tokens: int) -> bool:
        """Whether `fork` would find the block for the tokens after the last full block."""
        return parent_id in self._tables and self.pool.can_take(int(num_tokens % self.block_size > 0))

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> Fork:
        """Give `child_id` a table with the parent's first `num_tokens` tokens: full blocks are shared, a last block
        that is filled in part is copied.
        """
        assert child_id not in self._tables, f"{child_id!r} has a table already"
        parent = self._tables[parent_id]
        num_full = num_tokens // self.block_size
        new_blocks = self.pool.take(int(num_tokens % self.block_size > 0))
        self.pool.share(parent[:num_full])
        self._tables[child_id] = parent[:num_full] + new_blocks
        self._total_forks += 1
        return Fork(new_blocks, [BlockCopy(parent[num_full], block) for block in new_blocks])

    # --- swapping ---

    @property
    def num_promised_blocks(self) -> int:
        """Blocks that will be free when the copies out and the steps under way end."""
        transfers = self._swap.transfers.values()
        leaving = [t.device_blocks for t in transfers if t.direction == "out" or t.is_orphan]
        leaving += [blocks for _, blocks in self._deferred]
        return sum(self.pool.num_owners(block) == 1 for blocks in leaving for block in blocks)

    def is_swapped(self, seq_id: str) -> bool:
        """Whether the sequence's KV rests in a tier, complete, with no copy under way."""
        return seq_id in self._swap.resting

    def is_in_transfer(self, seq_id: str) -> bool:
        """Whether a copy of the sequence is under way."""
        return seq_id in self._swap.transfers

    def begin_swap_out(self, seq_id: str, num_computed_tokens: int) -> TierCopy | None:
        """Reserve room in a tier for the sequence's computed tokens; None when there is none, or nothing to keep."""
        num_blocks = self.blocks_for(num_computed_tokens)
        return self._swap.begin_out(seq_id, self._tables[seq_id], num_blocks, num_computed_tokens)

    def can_swap_in(self, seq_id: str, num_tokens: int, headroom: int = 0) -> bool:
        """Whether the sequence is swapped and `begin_swap_in` would leave `headroom` blocks free."""
        return self.is_swapped(seq_id) and self.pool.can_take(self.blocks_for(num_tokens) + headroom)

    def begin_swap_in(self, seq_id: str, num_tokens: int) -> TierCopy:
        """Give a swapped sequence a table for `num_tokens` tokens, at least as many as were kept, to be filled."""
        assert seq_id not in self._tables, f"{seq_id!r} has a table already"
        assert num_tokens >= self._swap.resting[seq_id].num_tokens, "a table too short for what was kept"
        self._tables[seq_id] = self.pool.take(self.blocks_for(num_tokens))
        return self._swap.begin_in(seq_id, self._tables[seq_id])

    def finish_swap(self, seq_id: str) -> list[int]:
        """The copy has arrived: release its source. Returns the device blocks that nobody uses any more."""
        return self._end_swap(seq_id, arrived=True)

    def abort_swap(self, seq_id: str) -> list[int]:
        """The copy failed: release its target; the sequence is where it was. Returns the device blocks given back."""
        return self._end_swap(seq_id, arrived=False)

    def _end_swap(self, seq_id: str, arrived: bool) -> list[int]:
        transfer = self._swap.end(seq_id, arrived)
        stays_on_device = arrived == (transfer.direction == "in")
        if transfer.is_orphan:
            return self.pool.give_back(transfer.device_blocks)
        if stays_on_device:
            return []
        self._prefixes.lose_table(seq_id)
        return self.pool.give_back(self._tables.pop(seq_id))

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
            num_host_used=swap.num_used("host"),
            num_disk_used=swap.num_used("disk"),
            total_queried_tokens=prefixes.total_queried_tokens,
            total_hit_tokens=prefixes.total_hit_tokens,
            total_evictions=pool.total_evictions,
            total_swaps_out=swap.total_out,
            total_swaps_in=swap.total_in,
            total_forks=self._total_forks,
        )

    def check_integrity(self, live: Iterable[str] | None = None) -> None:
        """Check that tables, pool and tiers agree and tables share nothing but beginnings.

        `live`, if given, names all sequences that have a table.
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
        return [*self._tables.values(), *orphans, *(blocks for _, blocks in self._deferred)]

    def _check_sharing(self, num_owners: Counter[int]) -> None:
        """A shared block stands at one place in all its tables: it is a piece of equal beginnings.

        The blocks before it may differ where two sequences computed the same tokens at once, each for itself.
        """
        place: dict[int, int] = {}
        for table in self._all_owned():
            for index, block in enumerate(table):
                if num_owners[block] > 1:
                    assert place.setdefault(block, index) == index, f"block {block} is shared beyond a prefix"

    def _strays(self, live: Iterable[str]) -> list[str]:
        return sorted(self._tables.keys() ^ set(live))
