"""Hands out the numbers of KV blocks and takes them back.

A pool knows nothing of requests or tokens; `manager.py` keeps the block tables. Blocks are numbered from 0, so a
number is an index into the first axis of the cache tensors. Both operations cost O(blocks moved), whatever the pool's
size.
"""

from collections import deque
from collections.abc import Sequence


class BlockPool:
    """A pool of `num_blocks` KV blocks, or of as many as are asked for when `num_blocks` is None.

    Returned blocks are given out again in the order of their return, before any block that was never used; an unbounded
    pool therefore never numbers a block above its peak use.
    """

    def __init__(self, num_blocks: int | None = None) -> None:
        if num_blocks is not None and num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._returned: deque[int] = deque()
        self._num_touched = 0
        self._used: set[int] = set()

    @property
    def num_used(self) -> int:
        """Blocks now out of the pool."""
        return len(self._used)

    @property
    def num_free(self) -> int | None:
        """Blocks that can still be taken; None when the pool is unbounded."""
        return None if self.num_blocks is None else self.num_blocks - len(self._used)

    def can_take(self, num: int) -> bool:
        """Whether `num` blocks are free."""
        return self.num_blocks is None or num <= self.num_blocks - len(self._used)

    def take(self, num: int) -> list[int]:
        """Take `num` blocks; ask `can_take` first."""
        assert self.can_take(num), f"{num} blocks taken from a pool with {self.num_free} free: ask can_take first"
        num_recycled = min(num, len(self._returned))
        blocks = [self._returned.popleft() for _ in range(num_recycled)] if num_recycled else []
        num_fresh = num - num_recycled
        if num_fresh:
            blocks += range(self._num_touched, self._num_touched + num_fresh)
            self._num_touched += num_fresh
        self._used.update(blocks)
        return blocks

    def give_back(self, blocks: Sequence[int]) -> None:
        """Return blocks that were taken; a block that is not out of the pool is a double free."""
        for block in blocks:
            assert block in self._used, f"block {block} is freed twice"
            self._used.remove(block)
        self._returned.extend(blocks)

    def check_integrity(self) -> None:
        """Check that every block is either used or free, and none is both."""
        returned = set(self._returned)
        assert len(returned) == len(self._returned), "a block is in the free line twice"
        assert returned.isdisjoint(self._used), f"blocks both free and used: {sorted(returned & self._used)}"
        known = returned | self._used
        assert known == set(range(self._num_touched)), "a block is neither free nor used"
        assert self.num_blocks is None or self._num_touched <= self.num_blocks, "a block beyond the pool was given out"
