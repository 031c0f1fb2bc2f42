"""Forks, pending frees and two-phase swaps: the owners of every block in each state and after each outcome."""

import pytest

from sageLLM.runtime.kv.copies import BlockCopy, TierCopy
from sageLLM.runtime.kv.manager import PagedKVManager


def swapping(host_blocks: int = 4, disk_blocks: int = 0) -> PagedKVManager:
    """A pool of four blocks, all used by `a` (7 of 8 tokens computed) and `b`."""
    kv = PagedKVManager(4, 4, host_blocks=host_blocks, disk_blocks=disk_blocks)
    kv.allocate("a", 8)
    kv.allocate("b", 8)
    return kv


# --- forks ---


def test_a_fork_shares_full_blocks_and_copies_the_partial_last_one() -> None:
    kv = PagedKVManager(8, 4)
    kv.allocate("a", 10)
    fork = kv.fork("a", "b", 10)
    assert fork.copies == [BlockCopy(2, 3)]
    assert fork.new_blocks == [3]
    assert kv.block_table("b") == [0, 1, 3]
    kv.check_integrity(["a", "b"])
    assert kv.free("a") == [2]
    kv.check_integrity(["b"])
    assert kv.free("b") == [0, 1, 3]


def test_a_fork_at_the_end_of_a_block_copies_nothing() -> None:
    kv = PagedKVManager(2, 4)
    kv.allocate("a", 8)
    assert kv.can_fork("a", 8)
    assert kv.fork("a", "b", 8).copies == []
    assert kv.block_table("b") == [0, 1]
    assert kv.block_table("b") is not kv.block_table("a")
    kv.check_integrity(["a", "b"])


def test_a_fork_does_not_take_blocks_that_the_parent_reserved_further_on() -> None:
    kv = PagedKVManager(4, 4)
    kv.allocate("a", 12)
    assert kv.fork("a", "b", 6).copies == [BlockCopy(1, 3)]
    assert kv.block_table("b") == [0, 3]


def test_a_fork_requires_a_parent_and_a_block_for_its_tail() -> None:
    kv = PagedKVManager(2, 4)
    kv.allocate("a", 8)
    assert not kv.can_fork("a", 7)
    assert not kv.can_fork("unknown", 8)


def test_five_forks_count_five_owners() -> None:
    kv = PagedKVManager(8, 4)
    kv.allocate("a", 4)
    for child in "bcde":
        kv.fork("a", child, 4)
    assert kv.pool.num_owners(0) == 5
    for seq_id in "abcd":
        assert kv.free(seq_id) == []
    assert kv.free("e") == [0]
    kv.check_integrity([])


def test_the_integrity_check_notices_sharing_beyond_a_prefix() -> None:
    kv = PagedKVManager(8, 4)
    kv.allocate("a", 8)
    kv.allocate("b", 8)
    kv.pool.share([kv.block_table("a")[1]])
    kv.block_table("b").append(kv.block_table("a")[1])
    with pytest.raises(AssertionError, match="block 1 is shared beyond a prefix"):
        kv.check_integrity(["a", "b"])


# --- pending frees ---


def test_a_block_freed_while_a_step_runs_is_not_reused_before_its_end() -> None:
    kv = PagedKVManager(2, 4)
    kv.allocate("a", 8)
    assert kv.free("a", until_step=7) == []
    assert not kv.can_allocate("b", 1)
    assert kv.num_pending_free_blocks == 2
    kv.check_integrity([])
    assert kv.end_step(6) == []
    assert kv.end_step(7) == [0, 1]
    assert kv.can_allocate("b", 8)
    kv.check_integrity([])


def test_a_cached_block_is_found_while_its_free_is_pending() -> None:
    kv = PagedKVManager(3, 4, enable_prefix_caching=True)
    tokens = list(range(5))
    kv.track("a", tokens, [])
    kv.admit("a", 5)
    kv.publish("a", 5)
    kv.free("a", until_step=0)
    kv.track("b", tokens, [])
    assert kv.admit("b", 5).hit_blocks == [0]
    assert kv.end_step(0) == [1]
    kv.check_integrity(["b"])
    assert kv.free("b") == [0, 2]


# --- swapping out ---


def test_a_swap_out_pins_its_blocks_until_the_copy_has_arrived() -> None:
    kv = swapping()
    copy = kv.begin_swap_out("a", 7)
    assert copy == TierCopy("a", "device", "host", [0, 1], [0, 1], 7)
    assert kv.is_in_transfer("a")
    assert not kv.is_swapped("a")
    assert not kv.can_allocate("c", 1)
    assert kv.num_pending_free_blocks == 2
    assert (kv.stats().num_in_transfer, kv.stats().num_used) == (2, 2)
    kv.check_integrity(["a", "b"])
    assert kv.finish_swap("a") == [0, 1]
    assert kv.is_swapped("a")
    assert not kv.holds("a")
    assert (kv.stats().num_free, kv.stats().num_host_used) == (2, 2)
    kv.check_integrity(["b"])


def test_only_computed_blocks_are_kept() -> None:
    kv = swapping()
    copy = kv.begin_swap_out("a", 4)
    assert copy is not None
    assert copy.source_blocks == [0]
    assert kv.finish_swap("a") == [0, 1]
    assert kv.begin_swap_out("b", 0) is None


def test_an_aborted_swap_out_leaves_the_sequence_on_the_device() -> None:
    kv = swapping()
    kv.begin_swap_out("a", 7)
    assert kv.abort_swap("a") == []
    assert kv.block_table("a") == [0, 1]
    assert kv.stats().num_host_used == 0
    assert kv.stats().total_swaps_out == 0
    kv.check_integrity(["a", "b"])


def test_a_full_host_falls_back_to_disk_and_a_full_disk_to_recompute() -> None:
    kv = swapping(host_blocks=2, disk_blocks=1)
    assert kv.begin_swap_out("a", 7) is not None
    assert kv.begin_swap_out("b", 7) is None  # two blocks, and the disk has one
    copy = kv.begin_swap_out("b", 3)
    assert copy is not None
    assert copy.target == "disk"
    kv.finish_swap("a")
    kv.finish_swap("b")
    assert (kv.stats().num_host_used, kv.stats().num_disk_used) == (2, 1)
    kv.check_integrity([])


def test_a_shared_block_stays_with_its_other_owner() -> None:
    kv = PagedKVManager(4, 4, host_blocks=4)
    kv.allocate("a", 8)
    kv.fork("a", "b", 8)
    kv.begin_swap_out("a", 8)
    assert kv.num_pending_free_blocks == 0
    assert kv.finish_swap("a") == []
    kv.check_integrity(["b"])
    kv.begin_swap_in("a", 8)
    kv.finish_swap("a")
    assert set(kv.block_table("a")).isdisjoint(kv.block_table("b"))
    kv.check_integrity(["a", "b"])


# --- swapping in ---


def swapped() -> PagedKVManager:
    kv = swapping()
    kv.begin_swap_out("a", 7)
    kv.finish_swap("a")
    return kv


def test_a_swap_in_fills_a_new_table_and_then_frees_the_tier() -> None:
    kv = swapped()
    assert kv.can_swap_in("a", 8)
    assert not kv.can_swap_in("a", 8, headroom=1)
    assert not kv.can_swap_in("a", 9)
    assert not kv.can_swap_in("b", 1)
    copy = kv.begin_swap_in("a", 8)
    assert copy == TierCopy("a", "host", "device", [0, 1], kv.block_table("a"), 7)
    assert kv.stats().num_host_used == 2
    assert kv.num_pending_free_blocks == 0
    kv.check_integrity(["a", "b"])
    assert kv.finish_swap("a") == []
    assert kv.stats().num_host_used == 0
    assert not kv.is_swapped("a")
    kv.check_integrity(["a", "b"])
    assert (kv.stats().total_swaps_out, kv.stats().total_swaps_in) == (1, 1)


def test_an_aborted_swap_in_releases_the_device_blocks_and_can_be_repeated() -> None:
    kv = swapped()
    kv.begin_swap_in("a", 8)
    assert kv.abort_swap("a") == [0, 1]
    assert kv.is_swapped("a")
    assert not kv.holds("a")
    kv.check_integrity(["b"])
    kv.begin_swap_in("a", 8)
    kv.finish_swap("a")
    kv.check_integrity(["a", "b"])


def test_a_table_filled_from_a_tier_is_published() -> None:
    kv = PagedKVManager(8, 4, enable_prefix_caching=True, host_blocks=4)
    kv.track("a", list(range(9)), [])
    kv.admit("a", 9)
    kv.publish("a", 9)
    kv.begin_swap_out("a", 9)
    kv.finish_swap("a")
    kv.reset_prefix_cache()  # the labels of its old blocks
    kv.begin_swap_in("a", 9)
    kv.finish_swap("a")
    kv.publish("a", 9)
    kv.track("b", list(range(9)), [])
    assert kv.num_cached_tokens("b") == 8


# --- freeing in every state ---


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_sequence_freed_during_a_copy_releases_its_blocks_after_the_copy(direction: str, arrived: bool) -> None:
    kv = swapping() if direction == "out" else swapped()
    if direction == "out":
        kv.begin_swap_out("a", 7)
    else:
        kv.begin_swap_in("a", 8)
    assert kv.free("a") == []
    assert not kv.holds("a")
    assert kv.num_pending_free_blocks == 2
    assert not kv.can_allocate("c", 1)
    kv.check_integrity(["b"])
    assert kv.finish_swap("a") == [0, 1] if arrived else kv.abort_swap("a") == [0, 1]
    assert kv.stats().num_host_used == 0
    assert not kv.is_swapped("a")
    kv.check_integrity(["b"])


def test_freeing_a_swapped_sequence_empties_the_tier() -> None:
    kv = swapped()
    assert kv.free("a") == []
    assert kv.stats().num_host_used == 0
    kv.check_integrity(["b"])


def test_a_tier_of_negative_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="tiers must have at least 0 blocks, got -1 on the host and 0 on disk"):
        PagedKVManager(4, 4, host_blocks=-1)
