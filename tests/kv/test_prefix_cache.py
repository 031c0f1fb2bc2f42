"""The prefix cache: hits, visibility, cost and eviction order."""

import gc
import hashlib
import random
from itertools import takewhile

import pytest

from sageLLM.runtime.kv.hash_chain import HashChain
from sageLLM.runtime.kv.manager import PagedKVManager


def caching(num_blocks: int | None = 8, block_size: int = 4) -> PagedKVManager:
    return PagedKVManager(num_blocks, block_size, enable_prefix_caching=True)


def run(kv: PagedKVManager, seq_id: str, tokens: list[int], salt: str = "") -> int:
    """Admits, computes and ends a sequence; returns the number of its cached tokens."""
    kv.track(seq_id, tokens, [], salt)
    admission = kv.admit(seq_id, len(tokens))
    kv.publish(seq_id, len(tokens))
    kv.free(seq_id)
    kv.forget(seq_id)
    kv.check_integrity([])
    return admission.num_cached_tokens


def test_a_block_is_named_by_everything_before_it() -> None:
    chain = HashChain(2, [1, 2, 3], [4], salt="s")
    root = hashlib.sha256(b"s").digest()
    first = hashlib.sha256(root + (1).to_bytes(8, "little") + (2).to_bytes(8, "little")).digest()
    second = hashlib.sha256(first + (3).to_bytes(8, "little") + (4).to_bytes(8, "little")).digest()
    assert chain.name(1) == second
    assert chain.name(0) == first


def test_the_names_follow_outputs_that_grow() -> None:
    outputs: list[int] = []
    chain = HashChain(4, [1, 2, 3], outputs)
    outputs += [4, 5, 6, 7, 8]
    whole = HashChain(4, [1, 2, 3, 4, 5, 6, 7, 8], [])
    assert [chain.name(0), chain.name(1)] == [whole.name(0), whole.name(1)]
    assert chain.num_tokens == 8


def test_an_equal_prefix_is_found_in_whole_blocks() -> None:
    kv = caching()
    assert run(kv, "a", list(range(10))) == 0
    kv.track("b", [*range(9), 99, 99], [])
    assert kv.num_cached_tokens("b") == 8
    admission = kv.admit("b", 11)
    assert admission.num_cached_tokens == 8
    assert kv.block_table("b") == admission.hit_blocks + admission.new_blocks
    assert (len(admission.hit_blocks), len(admission.new_blocks)) == (2, 1)


@pytest.mark.parametrize(("length", "cached"), [(8, 4), (9, 8), (4, 0), (3, 0)])
def test_a_prompt_that_is_cached_as_a_whole_leaves_a_token_to_compute(length: int, cached: int) -> None:
    kv = caching()
    tokens = list(range(length))
    run(kv, "a", tokens)
    assert run(kv, "b", tokens) == cached


def test_equal_blocks_after_different_beginnings_are_not_found() -> None:
    kv = caching()
    run(kv, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert run(kv, "b", [0, 2, 3, 4, 5, 6, 7, 8, 9]) == 0


def test_a_salt_keeps_sequences_apart() -> None:
    kv = caching(16)
    tokens = list(range(9))
    run(kv, "a", tokens, salt="tenant-1")
    assert run(kv, "b", tokens, salt="tenant-2") == 0
    assert run(kv, "c", tokens, salt="tenant-1") == 8


def test_a_block_is_invisible_until_it_is_filled() -> None:
    kv = caching()
    tokens = list(range(12))
    kv.track("a", tokens, [])
    kv.admit("a", 12)
    kv.track("b", tokens, [])
    assert kv.num_cached_tokens("b") == 0
    kv.publish("a", 7)
    assert kv.num_cached_tokens("b") == 4
    kv.publish("a", 8)
    assert kv.num_cached_tokens("b") == 8


def test_running_sequences_share_blocks_and_the_last_one_out_leaves_them_cached() -> None:
    kv = caching()
    tokens = list(range(9))
    for seq_id in "ab":
        kv.track(seq_id, tokens, [])
        kv.admit(seq_id, 9)
        kv.publish(seq_id, 9)
    shared = kv.block_table("a")[:2]
    assert kv.block_table("b")[:2] == shared
    assert kv.pool.num_used == 4
    assert set(kv.free("a")).isdisjoint(shared)
    kv.check_integrity(["b"])
    assert set(shared) < set(kv.free("b"))
    assert kv.stats().num_cached == 2
    kv.check_integrity([])


def test_of_two_blocks_with_the_same_contents_one_is_cached() -> None:
    kv = caching()
    tokens = list(range(9))
    for seq_id in "ab":  # both admitted before either has filled a block
        kv.track(seq_id, tokens, [])
        kv.admit(seq_id, 9)
    for seq_id in "ab":
        kv.publish(seq_id, 9)
        kv.free(seq_id)
    kv.check_integrity([])
    assert kv.stats().num_cached == 2
    assert kv.stats().num_free == 6


def test_a_hit_needs_a_free_block_only_if_it_is_idle() -> None:
    kv = caching(num_blocks=3)
    tokens = list(range(12))
    kv.track("a", tokens, [])
    kv.admit("a", 12)
    kv.publish("a", 12)
    kv.track("b", [*tokens[:8], 50, 51], [])
    assert not kv.can_admit("b", 10)  # two shared, but no block for the third
    kv.free("a")
    assert kv.can_admit("b", 10)
    assert not kv.can_admit("b", 10, headroom=1)
    assert not kv.can_admit("b", 13)
    kv.admit("b", 10)
    kv.check_integrity(["b"])


def test_the_least_recently_used_is_evicted_first_and_ends_before_beginnings() -> None:
    kv = caching(num_blocks=4)
    old, new = [1] * 9, [2] * 5
    run(kv, "old", old)
    run(kv, "new", new)
    assert kv.stats().num_cached == 3
    kv.admit("big", 8)  # one free block, and one evicted
    kv.track("o", old, [])
    kv.track("n", new, [])
    assert kv.num_cached_tokens("o") == 4, "the end of the older one goes first"
    assert kv.num_cached_tokens("n") == 4
    kv.allocate("big", 12)
    assert kv.num_cached_tokens("o") == 0
    assert kv.num_cached_tokens("n") == 4
    assert kv.stats().total_evictions == 2
    kv.check_integrity(["big"])


def test_a_hit_makes_a_block_recently_used() -> None:
    kv = caching(num_blocks=4)
    run(kv, "a", [1] * 5)
    run(kv, "b", [2] * 5)
    assert run(kv, "a2", [1] * 5) == 4
    kv.admit("big", 12)
    kv.track("a3", [1] * 5, [])
    kv.track("b3", [2] * 5, [])
    assert (kv.num_cached_tokens("a3"), kv.num_cached_tokens("b3")) == (4, 0)


def test_outputs_are_cached_for_the_next_turn_and_for_a_replay() -> None:
    kv = caching()
    outputs: list[int] = []
    kv.track("a", [1, 2, 3], outputs)
    kv.admit("a", 3)
    outputs += [4, 5, 6, 7, 8, 9]
    kv.allocate("a", 8)
    kv.publish("a", 8)
    kv.free("a")  # preempted: its own blocks are found again
    assert kv.num_cached_tokens("a") == 8
    assert run(kv, "next turn", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == 8


def ended(kv: PagedKVManager, seq_id: str, prompt: list[int], outputs: list[int]) -> None:
    """Serves a sequence to its end as the scheduler does."""
    known: list[int] = []
    kv.track(seq_id, prompt, known)
    kv.admit(seq_id, len(prompt))
    kv.publish(seq_id, len(prompt))
    known += outputs
    kv.allocate(seq_id, len(prompt) + len(outputs))
    kv.publish(seq_id, len(prompt) + len(outputs))
    kv.free(seq_id)
    kv.forget(seq_id)
    kv.check_integrity([])


def hits(kv: PagedKVManager, tokens: list[int]) -> int:
    kv.track("asks", tokens, [])
    found = kv.num_cached_tokens("asks")
    kv.forget("asks")
    kv.check_integrity()
    return found


PROMPT, ANSWER = [1, 2, 3, 4, 5, 6], list(range(7, 20))


def num_named(kv: PagedKVManager) -> int:
    """Blocks with a name, rather than a place to wait for one."""
    return len(kv.pool._by_label)


def test_a_block_is_named_when_another_sequence_reaches_the_one_before() -> None:
    kv = caching()
    ended(kv, "a", PROMPT, ANSWER)  # four blocks; the first was looked up, the second could equal a named one
    assert num_named(kv) == 2
    assert hits(kv, [*PROMPT, 0, 0, 0]) == 4
    assert num_named(kv) == 2
    assert hits(kv, [*PROMPT, *ANSWER, 0]) == 16
    assert num_named(kv) == 4
    assert not kv._prefixes._unnamed


def test_a_chunk_is_named_with_the_chunks_before_it() -> None:
    kv = caching()
    tokens = list(range(16))
    kv.track("a", tokens, [])
    kv.admit("a", 16)
    for num_computed in (9, 13, 16):
        kv.publish("a", num_computed)
    assert num_named(kv) == 1
    assert hits(kv, [*tokens, 0]) == 16


@pytest.mark.parametrize("seed", range(6))
def test_exactly_what_was_published_is_found(seed: int) -> None:
    """Random sequences over few tokens: hits are those of a cache that names every block at once."""
    rng = random.Random(seed)
    kv, size = caching(num_blocks=2000, block_size=2), 2
    published: set[tuple[str, tuple[int, ...]]] = set()
    running: dict[str, tuple[list[int], list[int], str, int]] = {}

    def num_found(salt: str, tokens: list[int]) -> int:
        whole = (salt, tuple(tokens))
        ends = takewhile(lambda end: (salt, whole[1][:end]) in published, range(size, len(tokens), size))
        return max(ends, default=0)

    waiting = {f"w{i}": [rng.randrange(2) for _ in range(12)] for i in range(8)}
    for name, tokens in waiting.items():
        kv.track(name, tokens, [])
    for number in range(150):
        name, salt = str(number), rng.choice(["", "", "s"])
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 9))]
        outputs: list[int] = []
        kv.track(name, prompt, outputs, salt)
        found = num_found(salt, prompt)
        assert kv.num_cached_tokens(name) == found
        kv.admit(name, len(prompt))
        running[name] = (prompt, outputs, salt, found)
        for other in rng.sample(list(running), k=min(3, len(running))):
            prompt, outputs, salt, num_computed = running[other]
            outputs += [rng.randrange(2) for _ in range(rng.randint(0, 5))]
            tokens = prompt + outputs
            num_computed = rng.randint(num_computed, len(tokens))
            kv.allocate(other, len(tokens))
            kv.publish(other, num_computed)
            published |= {(salt, tuple(tokens[:end])) for end in range(size, num_computed + 1, size)}
            running[other] = (prompt, outputs, salt, num_computed)
            if rng.random() < 0.3:
                kv.free(other)
                kv.forget(other)
                del running[other]
                outputs += [5, 5, 5]  # the engine's list is no concern of the cache any more
            assert len(kv.pool._label_of) == len(published), "of equal blocks one is cached"
            name, tokens = rng.choice(list(waiting.items()))
            assert kv.num_cached_tokens(name) == num_found("", tokens), "a waiting sequence, matched before"
        kv.check_integrity(running)


def test_cached_blocks_keep_no_token_list_alive() -> None:
    kv = caching()
    ended(kv, "a", PROMPT, ANSWER)
    (waiting,) = kv._prefixes._unnamed.values()
    assert not any(isinstance(one, list) and 7 in one for one in gc.get_referents(waiting))
    kv.track("b", list(range(30, 44)), [])
    kv.admit("b", 14)
    kv.publish("b", 14)
    assert any(unnamed._chain is not None for unnamed in kv._prefixes._unnamed.values())
    kv.forget("b")
    assert all(unnamed._chain is None for unnamed in kv._prefixes._unnamed.values())
    kv.free("b")


def test_the_order_of_eviction_stays_short() -> None:
    kv = caching(num_blocks=8)
    for turn in range(300):
        run(kv, f"s{turn}", [1] * 9)
        assert len(kv.pool._eviction_order) <= 2 * kv.pool.num_idle + 66


def test_outputs_after_outputs_are_found() -> None:
    kv = caching(num_blocks=12)
    ended(kv, "a", PROMPT, ANSWER)
    ended(kv, "b", [*PROMPT, *ANSWER], list(range(30, 43)))
    assert hits(kv, [*PROMPT, *ANSWER, *range(30, 43), 0]) == 32


def test_a_waiting_sequence_finds_outputs_that_end_later() -> None:
    kv = caching()
    prompt, outputs = [1, 2, 3, 4, 5, 6, 7, 8], list[int]()
    kv.track("waits", [*prompt, *ANSWER], [])
    kv.track("a", prompt, outputs)
    kv.admit("a", 8)
    kv.publish("a", 8)
    assert kv.num_cached_tokens("waits") == 8
    outputs += ANSWER
    kv.allocate("a", 21)
    kv.publish("a", 21)
    assert kv.num_cached_tokens("waits") == 20


@pytest.mark.parametrize("num_evicted", [1, 2, 3])
def test_evicted_outputs_are_not_found(num_evicted: int) -> None:
    kv = caching(num_blocks=5)
    ended(kv, "a", PROMPT, ANSWER)
    kv.allocate("other", 4 * (num_evicted + 1))  # one block was free
    kv.free("other")
    assert bool(kv._prefixes._unnamed) == (num_evicted == 1), "without blocks the tokens are released"
    assert hits(kv, [*PROMPT, *ANSWER, 0]) == 16 - 4 * num_evicted


def test_of_two_equal_outputs_one_stays_cached() -> None:
    kv = caching(num_blocks=12)
    prompts = {name: list(PROMPT) for name in "ab"}
    outputs: dict[str, list[int]] = {name: [] for name in "ab"}
    for name in "ab":
        kv.track(name, prompts[name], outputs[name])
        kv.admit(name, 6)
        outputs[name] += ANSWER
        kv.allocate(name, 19)
    for name in "ab":
        kv.publish(name, 19)
        kv.free(name)
    assert kv.stats().num_cached == 4
    assert hits(kv, [*PROMPT, *ANSWER, 0]) == 16


def test_a_reset_forgets_outputs_that_are_not_hashed() -> None:
    kv = caching()
    ended(kv, "a", PROMPT, ANSWER)
    kv.reset_prefix_cache()
    assert kv.stats().num_cached == 0
    assert not kv._prefixes._unnamed, "the tokens are released"
    assert hits(kv, [*PROMPT, *ANSWER, 0]) == 0


def test_outputs_shared_with_a_running_fork_are_found() -> None:
    kv = caching(num_blocks=12)
    outputs: list[int] = []
    kv.track("a", PROMPT, outputs)
    kv.admit("a", 6)
    outputs += ANSWER
    kv.allocate("a", 19)
    kv.track("fork", [*PROMPT, *ANSWER], [])
    kv.fork("a", "fork", 19)
    kv.publish("a", 19)
    kv.free("a")
    assert hits(kv, [*PROMPT, *ANSWER, 0]) == 16
    kv.publish("fork", 19)
    kv.free("fork")
    assert hits(kv, [*PROMPT, *ANSWER, 0]) == 16


def test_a_replay_publishes_its_new_table() -> None:
    kv = caching(num_blocks=3)
    tokens = list(range(9))
    kv.track("a", tokens, [])
    kv.admit("a", 9)
    kv.publish("a", 9)
    kv.free("a")
    kv.allocate("other", 12)  # evicts all of it
    kv.free("other")
    assert kv.admit("a", 9).num_cached_tokens == 0
    kv.publish("a", 9)
    kv.free("a")
    assert kv.num_cached_tokens("a") == 8


def test_without_caching_no_block_is_kept() -> None:
    kv = PagedKVManager(8, 4)
    assert run(kv, "a", list(range(9))) == run(kv, "b", list(range(9))) == 0
    assert kv.stats().num_cached == kv.stats().total_queried_tokens == 0


def test_the_statistics_count_queries_and_hits() -> None:
    kv = caching()
    run(kv, "a", list(range(9)))
    run(kv, "b", list(range(9)))
    assert (kv.stats().total_queried_tokens, kv.stats().total_hit_tokens) == (18, 8)


def test_a_reset_forgets_everything_and_frees_the_idle_blocks() -> None:
    kv = caching()
    tokens = list(range(9))
    run(kv, "a", tokens)
    kv.track("b", tokens, [])
    kv.admit("b", 9)
    kv.reset_prefix_cache()
    kv.check_integrity(["b"])
    kv.free("b")
    assert kv.stats().num_free == 8
    kv.check_integrity([])
    assert run(kv, "c", tokens) == 0


def test_an_unbounded_pool_reuses_cached_blocks_before_it_grows() -> None:
    kv = caching(num_blocks=None)
    for turn in range(20):
        run(kv, f"s{turn}", [turn] * 9)
        assert kv.pool.num_idle <= 3
