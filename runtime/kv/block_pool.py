"""Pool of KV block numbers with reference counts and an LRU cache of labelled blocks.

A pool is independent of requests and tokens; `manager.py` keeps the block tables. Blocks are numbered from 0, so a
number is an index into the first axis of the cache tensors. Every operation costs O(blocks moved), whatever the size of
the pool.

A block is free, used (by one or more owners), or idle: without an owner, but labelled with its contents, so that it can
be found again. When no free block is left, idle blocks are taken, the least recently used first.

A label is the hash of the contents, or a claim: a hash that is computed when the block may be looked up.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import filterfalse
from typing import Protocol

from sageLLM.runtime.kv.events import KVEventLog


class Claim(Protocol):
    """The labels of several blocks, not computed yet."""

    def lose_block(self) -> None:
        """One of the blocks was evicted."""
        ...

    def replace_block(self, old: int, new: int) -> None:
        """The contents of one of the blocks have moved."""
        ...


class BlockPool:
    """A pool of `num_blocks` KV blocks; unbounded if `num_blocks` is None.

    Released blocks are taken again in the order of their release, before blocks that were never used. An unbounded pool
    also takes idle blocks before new ones, so its block numbers stay below its peak use.
    """

    def __init__(self, num_blocks: int | None = None) -> None:
        if num_blocks is not None and num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.total_evictions = 0
        # Changes with every label that is added or dropped, and so invalidates remembered results of `find`.
        self.labels_version = 0
        self._returned: deque[int] = deque()
        self._num_touched = 0
        self._used: set[int] = set()
        self._num_other_owners: dict[int, int] = {}
        self._idle: set[int] = set()
        # The idle blocks in the order of eviction. Its stale entries, those of blocks that are not idle or became idle
        # again later, are counted by block: they come before the valid one.
        self._eviction_order: deque[int] = deque()
        self._num_stale: dict[int, int] = {}
        self._label_of: dict[int, bytes | Claim] = {}
        self._by_label: dict[bytes, int] = {}
        self.log: KVEventLog | None = None

    @property
    def num_used(self) -> int:
        """The number of blocks with an owner."""
        return len(self._used)

    @property
    def num_idle(self) -> int:
        """The number of blocks without an owner that can be found by their label."""
        return len(self._idle)

    @property
    def num_free(self) -> int | None:
        """The number of blocks that can be taken, idle ones included; None if the pool is unbounded."""
        return None if self.num_blocks is None else self.num_blocks - len(self._used)

    def can_take(self, num: int) -> bool:
        """Whether `num` blocks can be taken."""
        return self.num_blocks is None or num <= self.num_blocks - len(self._used)

    def take(self, num: int) -> list[int]:
        """Takes `num` blocks as their only owner; `can_take(num)` must be true."""
        assert self.can_take(num), f"{num} blocks taken from a pool with {self.num_free} free: check can_take first"
        # Released blocks first: their memory is mapped and perhaps cached already.
        returned = self._returned
        if not returned:
            blocks = self._take_fresh_or_idle(num)
        elif num <= len(returned):
            blocks = [returned.popleft() for _ in range(num)]
        else:
            blocks = [*returned]
            returned.clear()
            blocks += self._take_fresh_or_idle(num - len(blocks))
        self._used.update(blocks)
        return blocks

    def _take_fresh_or_idle(self, num: int) -> list[int]:
        num_fresh = num - len(self._idle) if self.num_blocks is None else min(num, self.num_blocks - self._num_touched)
        num_fresh = max(0, num_fresh)
        fresh = list(range(self._num_touched, self._num_touched + num_fresh))
        self._num_touched += num_fresh
        return fresh + self._evict(num - num_fresh) if num_fresh < num else fresh

    def _evict(self, num: int) -> list[int]:
        order, num_stale, labels, by_label = self._eviction_order, self._num_stale, self._label_of, self._by_label
        blocks: list[int] = []
        while len(blocks) < num:
            block = order.popleft()
            if num_stale and block in num_stale:
                self._drop_stale(block)
                continue
            blocks.append(block)
            label = labels.pop(block)
            if isinstance(label, bytes):
                del by_label[label]
                if self.log is not None:
                    self.log.remove(label)
            else:
                label.lose_block()
        self._idle.difference_update(blocks)
        self.total_evictions += num
        self.labels_version += num
        return blocks

    def _drop_stale(self, block: int) -> None:
        num = self._num_stale[block]
        if num == 1:
            del self._num_stale[block]
        else:
            self._num_stale[block] = num - 1

    def _remove_idle(self, block: int) -> None:
        """An idle block is used again, or becomes free. Its entry in the order of eviction is stale."""
        self._idle.remove(block)
        self._num_stale[block] = self._num_stale.get(block, 0) + 1
        if len(self._eviction_order) > 2 * len(self._idle) + 64:
            self._compact()

    def _compact(self) -> None:
        """Removes the stale entries: at least half of them are, so a removal costs O(1) amortised."""
        order, self._eviction_order = self._eviction_order, deque()
        for block in order:
            if block in self._num_stale:
                self._drop_stale(block)
            else:
                self._eviction_order.append(block)

    def share(self, blocks: Iterable[int]) -> list[int]:
        """Adds an owner to blocks that are used or idle; returns those that were idle."""
        used, idle, others = self._used, self._idle, self._num_other_owners
        revived = []
        for block in blocks:
            if block in used:
                others[block] = others.get(block, 0) + 1
            else:
                assert block in idle, f"block {block} is free and cannot be shared"
                self._remove_idle(block)
                used.add(block)
                revived.append(block)
        return revived

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Removes one owner of these blocks; returns those without an owner now.

        The last of them is evicted first: a prefix is only found from its beginning on, so evicting the beginning would
        make the rest useless. Releasing a block without an owner is a double free.
        """
        ownerless = self._disown(blocks) if self._num_other_owners else list(blocks)
        # A double free is detected by the count: set difference ignores blocks that are not in the set.
        before = len(self._used)
        self._used.difference_update(ownerless)
        assert before - len(self._used) == len(ownerless), f"a block of {list(blocks)} is freed twice"
        labels = self._label_of
        if labels:  # without a prefix cache the common case stays one call
            self._returned.extend(filterfalse(labels.__contains__, ownerless))
            idle = list(filter(labels.__contains__, reversed(ownerless)))
            self._idle.update(idle)
            self._eviction_order.extend(idle)
        else:
            self._returned.extend(ownerless)
        return ownerless

    def _disown(self, blocks: Iterable[int]) -> list[int]:
        """Subtracts one owner from each block; returns those that had only one."""
        others, last = self._num_other_owners, []
        for block in blocks:
            num_others = others.get(block, 0)
            if num_others == 0:
                last.append(block)
            elif num_others == 1:
                del others[block]
            else:
                others[block] = num_others - 1
        return last

    def num_owners(self, block: int) -> int:
        """The number of owners of the block."""
        return 1 + self._num_other_owners.get(block, 0) if block in self._used else 0

    def count_idle(self, blocks: Iterable[int]) -> int:
        """The number of idle blocks among these."""
        return sum(map(self._idle.__contains__, blocks))

    # --- labels ---

    def find(self, label: bytes) -> int | None:
        """The block with this label, used or idle."""
        return self._by_label.get(label)

    def has_labels(self, blocks: Iterable[int]) -> bool:
        """Whether any of these blocks has a label."""
        return not self._label_of.keys().isdisjoint(blocks)

    def label(self, block: int, label: bytes) -> bool:
        """Labels a used block with its contents, so that `find` returns it; False if it is not labelled.

        Of several blocks with the same contents only the first gets the label; the others become free when released.
        """
        if label in self._by_label or block in self._label_of:
            return False
        assert block in self._used, f"block {block} is labelled without an owner"
        self._by_label[label] = block
        self._label_of[block] = label
        self.labels_version += 1
        return True

    def claim(self, blocks: Sequence[int], claim: Claim) -> int:
        """Labels used blocks without a label by the claim; returns their number.

        Remembered results of `find` stay valid: a claimed block cannot be found.
        """
        self._label_of.update(dict.fromkeys(blocks, claim))
        return len(blocks)

    def settle(self, block: int, claim: Claim, label: bytes, *, is_duplicate: bool = False) -> bool:
        """Labels a block of the claim, used or idle; False if it was evicted.

        If another block has this label, it becomes free when unused; `is_duplicate` says that one of another pool does.
        """
        if self._label_of.get(block) is not claim:  # evicted, and perhaps used again
            return False
        self.labels_version += 1
        if label not in self._by_label and not is_duplicate:
            self._by_label[label] = block
            self._label_of[block] = label
            return True
        del self._label_of[block]
        if block in self._idle:
            self._remove_idle(block)
            self._returned.append(block)
        return True

    def take_label(self, block: int) -> bytes | Claim | None:
        """Removes the label of a used block, and returns it."""
        label = self._label_of.pop(block, None)
        if isinstance(label, bytes):
            del self._by_label[label]
        self.labels_version += label is not None
        return label

    def put_label(self, block: int, label: bytes | Claim) -> None:
        """Labels a used block without a label by one that `take_label` has returned."""
        self._label_of[block] = label
        if isinstance(label, bytes):
            self._by_label[label] = block
        self.labels_version += 1

    def forget_labels(self) -> None:
        """Drops all labels; idle blocks become free."""
        self._compact()
        self._returned.extend(self._eviction_order)
        self._eviction_order.clear()
        self._idle.clear()
        self._label_of.clear()
        self._by_label.clear()
        self.labels_version += 1
        if self.log is not None:
            self.log.clear()

    def check_integrity(self) -> None:
        """Checks that every block is in exactly one state (free, used or idle), and that labels are consistent."""
        returned = set(self._returned)
        assert len(returned) == len(self._returned), "a block is in the free queue twice"
        assert returned.isdisjoint(self._used), f"blocks both free and used: {sorted(returned & self._used)}"
        assert self._idle.isdisjoint(self._used | returned), "an idle block is also free or used"
        known = returned | self._used | self._idle
        assert known == set(range(self._num_touched)), "a block is neither free nor used nor idle"
        assert self.num_blocks is None or self._num_touched <= self.num_blocks, "a block beyond the pool was taken"
        assert self._idle <= self._label_of.keys(), "an idle block cannot be found"
        entries = Counter(self._eviction_order)
        entries.subtract(self._num_stale)
        assert +entries == Counter(self._idle), "an idle block cannot be evicted"
        assert returned.isdisjoint(self._label_of), "a free block can be found"
        hashes = {label: block for block, label in self._label_of.items() if isinstance(label, bytes)}
        assert hashes == self._by_label, "labels are inconsistent"
        assert self._num_other_owners.keys() <= self._used, "an unused block has owners"
        assert all(num > 0 for num in self._num_other_owners.values()), "a share count is not positive"
