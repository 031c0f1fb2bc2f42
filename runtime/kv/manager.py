"""Keeps the block table of every sequence in one paged KV pool (PagedAttention, arXiv 2309.06180).

The protocol is `can_allocate` -> `allocate` (again and again while the sequence grows) -> `free`. A sequence is any
string id; the scheduler uses request ids. Tables are owned here and only read elsewhere.
"""

from collections.abc import Iterable, Sequence

from sageLLM.runtime.kv.block_pool import BlockPool

DEFAULT_BLOCK_SIZE = 16


class PagedKVManager:
    """Block tables over a pool of `num_blocks` (None: unbounded) blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int | None = None, block_size: int = DEFAULT_BLOCK_SIZE) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._tables: dict[str, list[int]] = {}

    @property
    def max_tokens(self) -> int | None:
        """Tokens that the empty pool holds; None when it is unbounded."""
        return None if self.pool.num_blocks is None else self.pool.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def holds(self, seq_id: str) -> bool:
        """Whether the sequence has a table here."""
        return seq_id in self._tables

    def block_table(self, seq_id: str) -> list[int]:
        """The live table of a sequence: token `t` lies in block `table[t // block_size]`. Read it, do not change it."""
        return self._tables[seq_id]

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

    def free(self, seq_id: str) -> list[int]:
        """Forget the sequence and return its blocks to the pool; a sequence without a table frees nothing."""
        blocks = self._tables.pop(seq_id, [])
        self.pool.give_back(blocks)
        return blocks

    def check_integrity(self, live: Iterable[str] | None = None) -> None:
        """Check that tables and pool agree and no block is in two tables; `live`, if given, names all sequences."""
        self.pool.check_integrity()
        owned = [block for table in self._tables.values() for block in table]
        assert len(set(owned)) == len(owned), "a block is in two tables"
        assert len(owned) == self.pool.num_used, f"{self.pool.num_used} blocks used, {len(owned)} of them in tables"
        if live is not None:
            assert self._tables.keys() == set(live), (
                f"tables without owner, or owners without table: {self._strays(live)}"
            )

    def _strays(self, live: Iterable[str]) -> list[str]:
        return sorted(self._tables.keys() ^ set(live))
