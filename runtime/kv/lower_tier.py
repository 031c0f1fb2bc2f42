"""Pool of block numbers over two tiers: those of the device come first, and those after them lie in the tier below.

A step loads the lower blocks that it reads layer by layer, which takes time, so blocks of the device are taken first,
also if that evicts cached ones, and lower ones move up when the device has free blocks again. Otherwise blocks of both
tiers are the same to their owners: a table may have both.
"""

from collections.abc import Iterable, Sequence

from sageLLM.runtime.kv.block_pool import BlockPool, Claim


class TwoTierPool(BlockPool):
    """A pool of `num_upper` blocks on the device, numbered from 0, and `num_lower` blocks after them."""

    def __init__(self, num_upper: int, num_lower: int) -> None:
        super().__init__(num_upper + num_lower)
        self._first_lower = num_upper
        self._upper, self._lower = BlockPool(num_upper), BlockPool(num_lower)

    @property
    def num_lower_used(self) -> int:
        """The number of blocks with an owner in the lower tier."""
        return self._lower.num_used

    @property
    def num_used(self) -> int:
        return self._upper.num_used + self._lower.num_used

    @property
    def num_idle(self) -> int:
        return self._upper.num_idle + self._lower.num_idle

    @property
    def num_free(self) -> int:
        return (self._upper.num_free or 0) + (self._lower.num_free or 0)

    @property
    def total_evictions(self) -> int:
        return self._upper.total_evictions + self._lower.total_evictions

    @total_evictions.setter
    def total_evictions(self, value: int) -> None:
        assert value == 0, "the pools of the tiers count"

    @property
    def labels_version(self) -> int:
        return self._upper.labels_version + self._lower.labels_version

    @labels_version.setter
    def labels_version(self, value: int) -> None:
        assert value == 0, "the pools of the tiers count"

    def can_take(self, num: int) -> bool:
        return num <= self.num_free

    def take(self, num: int) -> list[int]:
        num_upper = min(num, self._upper.num_free or 0)
        return [*self._upper.take(num_upper), *self._raised(self._lower.take(num - num_upper))]

    def share(self, blocks: Iterable[int]) -> list[int]:
        upper, lower = self._split(blocks)
        return [*self._upper.share(upper), *self._raised(self._lower.share(lower))]

    def release(self, blocks: Sequence[int]) -> list[int]:
        upper, lower = self._split(blocks)
        return [*self._upper.release(upper), *self._raised(self._lower.release(lower))]

    def num_owners(self, block: int) -> int:
        pool, number = self._home(block)
        return pool.num_owners(number)

    def count_idle(self, blocks: Iterable[int]) -> int:
        upper, lower = self._split(blocks)
        return self._upper.count_idle(upper) + self._lower.count_idle(lower)

    def find(self, label: bytes) -> int | None:
        found = self._upper.find(label)
        if found is None and (found := self._lower.find(label)) is not None:
            found += self._first_lower
        return found

    def has_labels(self, blocks: Iterable[int]) -> bool:
        upper, lower = self._split(blocks)
        return self._upper.has_labels(upper) or self._lower.has_labels(lower)

    def label(self, block: int, label: bytes) -> bool:
        pool, number = self._home(block)
        return self.find(label) is None and pool.label(number, label)

    def claim(self, blocks: Sequence[int], claim: Claim) -> int:
        upper, lower = self._split(blocks)
        return self._upper.claim(upper, claim) + self._lower.claim(lower, claim)

    def settle(self, block: int, claim: Claim, label: bytes, *, is_duplicate: bool = False) -> bool:
        pool, number = self._home(block)
        other = self._lower if pool is self._upper else self._upper
        return pool.settle(number, claim, label, is_duplicate=is_duplicate or other.find(label) is not None)

    def forget_labels(self) -> None:
        self._upper.forget_labels()
        self._lower.forget_labels()

    def movable(self, table: Sequence[int]) -> list[int]:
        """The places of blocks in the tier below that only this table owns."""
        first, lower = self._first_lower, self._lower
        return [i for i, block in enumerate(table) if block >= first and lower.num_owners(block - first) == 1]

    @property
    def num_upper_free(self) -> int:
        """The blocks of the device without an owner."""
        return self._upper.num_free or 0

    def move_up(self, block: int) -> int:
        """Takes a block of the device for the contents of a lower one, whose label moves as well.

        The lower block stays in use until it is released.
        """
        (moved,) = self._upper.take(1)
        label = self._lower.take_label(block - self._first_lower)
        if label is not None:
            self._upper.put_label(moved, label)
            if not isinstance(label, bytes):
                label.replace_block(block, moved)
        return moved

    def check_integrity(self) -> None:
        self._upper.check_integrity()
        self._lower.check_integrity()

    def _home(self, block: int) -> tuple[BlockPool, int]:
        """The pool of a block, and its number there."""
        if block < self._first_lower:
            return self._upper, block
        return self._lower, block - self._first_lower

    def _split(self, blocks: Iterable[int]) -> tuple[list[int], list[int]]:
        """The blocks of each tier by their numbers in its pool."""
        first, upper, lower = self._first_lower, [], []
        for block in blocks:
            if block < first:
                upper.append(block)
            else:
                lower.append(block - first)
        return upper, lower

    def _raised(self, lower: Iterable[int]) -> Iterable[int]:
        return (block + self._first_lower for block in lower)
