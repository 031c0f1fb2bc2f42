"""Block pool and block tables: allocation, release, and the errors that the integrity check detects."""

import random

import pytest

from sageLLM.runtime.kv.block_pool import BlockPool
from sageLLM.runtime.kv.manager import PagedKVManager


def test_a_table_grows_by_whole_blocks() -> None:
    kv = PagedKVManager(num_blocks=4, block_size=16)
    assert kv.allocate("a", 16) == [0]
    assert kv.allocate("a", 16) == []
    assert kv.allocate("a", 33) == [1, 2]
    assert kv.block_table("a") == [0, 1, 2]
    assert kv.pool.num_free == 1
    kv.check_integrity(["a"])


def test_can_allocate_counts_only_missing_blocks_and_headroom() -> None:
    kv = PagedKVManager(num_blocks=3, block_size=4)
    kv.allocate("a", 8)
    assert kv.can_allocate("a", 12)
    assert not kv.can_allocate("a", 13)
    assert kv.can_allocate("b", 4)
    assert not kv.can_allocate("b", 4, headroom=1)


def test_freed_blocks_are_reused_in_the_order_of_their_release() -> None:
    kv = PagedKVManager(num_blocks=4, block_size=1)
    kv.allocate("a", 2)
    kv.allocate("b", 2)
    assert kv.free("b") == [2, 3]
    assert kv.free("a") == [0, 1]
    assert kv.allocate("c", 3) == [2, 3, 0]
    assert not kv.holds("a")


def test_freeing_an_unknown_sequence_frees_nothing() -> None:
    assert PagedKVManager(num_blocks=1).free("unknown") == []


def test_an_unbounded_pool_never_numbers_above_its_peak() -> None:
    kv = PagedKVManager(block_size=2)
    for _ in range(50):
        kv.allocate("a", 10)
        kv.allocate("b", 10)
        assert max(kv.block_table("a") + kv.block_table("b")) < 10
        kv.free("a")
        kv.free("b")
    assert kv.max_tokens is None
    assert kv.pool.num_free is None


def test_a_double_free_and_an_overdraft_are_detected() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    with pytest.raises(AssertionError, match="1 blocks taken from a pool with 0 free: check can_take first"):
        pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match=r"a block of \[0\] is freed twice"):
        pool.release([0])
    pool.label(pool.take(1)[0], b"something")
    with pytest.raises(AssertionError, match=r"a block of \[1\] is freed twice"):
        pool.release([1])


class Blocks:
    """Claimed blocks."""

    num_lost = 0

    def replace_block(self, old: int, new: int) -> None:
        raise AssertionError("no block moves")

    def lose_block(self) -> None:
        self.num_lost += 1


def test_a_claimed_block_with_a_duplicate_becomes_free() -> None:
    pool, claim = BlockPool(4), Blocks()
    blocks = pool.take(3)
    pool.label(blocks[0], b"first")
    pool.claim(blocks[1:], claim)
    pool.release(blocks)
    assert pool.num_idle == 3
    assert pool.settle(blocks[1], claim, b"first")
    assert pool.settle(blocks[2], claim, b"second")
    assert (pool.num_idle, pool.find(b"first"), pool.find(b"second")) == (2, blocks[0], blocks[2])
    pool.check_integrity()
    assert pool.take(2) == [blocks[1], 3], "released blocks before fresh ones"
    assert not pool.settle(blocks[1], claim, b"third")
    pool.check_integrity()


def test_the_integrity_check_detects_a_shared_block_and_a_leak() -> None:
    kv = PagedKVManager(num_blocks=4, block_size=1)
    kv.allocate("a", 1)
    kv.allocate("b", 1)
    kv.block_table("a").append(1)
    with pytest.raises(AssertionError, match="block 1 has 2 owners, and the pool counts 1"):
        kv.check_integrity()
    kv.block_table("a").pop()
    with pytest.raises(AssertionError, match=r"owners without table: \['b'\]"):
        kv.check_integrity(["a"])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_sizes_must_be_positive(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        PagedKVManager(num_blocks, block_size)


def test_random_use_keeps_free_plus_used_equal_to_total() -> None:
    rng = random.Random(0)
    kv = PagedKVManager(num_blocks=40, block_size=4)
    lengths: dict[str, int] = {}
    for _ in range(3000):
        seq_id = str(rng.randrange(12))
        length = lengths.get(seq_id, 0) + rng.randrange(1, 20)
        if rng.random() < 0.3:
            kv.free(seq_id)
            lengths.pop(seq_id, None)
        elif kv.can_allocate(seq_id, length):
            kv.allocate(seq_id, length)
            lengths[seq_id] = length
        kv.check_integrity(lengths)
        assert kv.pool.num_used == sum(kv.blocks_for(length) for length in lengths.values())
        assert kv.pool.num_free == 40 - kv.pool.num_used
