"""Mutants of the KV cache."""

from mutant import Mutant

K = "runtime/kv/"
T = "tests/kv/"
MANAGER, CACHE, SWAP = (f"{T}test_manager.py",), (f"{T}test_prefix_cache.py",), (f"{T}test_fork_and_swap.py",)
RANDOM = (f"{T}test_random_use.py",)

KV = (
    Mutant(
        "the pool has a block more",
        f"{K}block_pool.py",
        "num <= self.num_blocks - len(self._used)",
        "num <= self.num_blocks + 1 - len(self._used)",
        MANAGER,
    ),
    Mutant("the newest block is evicted", f"{K}block_pool.py", "popitem(last=False)", "popitem(last=True)", CACHE),
    Mutant(
        "an evicted block can be found",
        f"{K}block_pool.py",
        "        self._drop_label(block)\n        self.total_evictions",
        "        self.total_evictions",
        CACHE,
    ),
    Mutant(
        "a beginning is evicted before its end",
        f"{K}block_pool.py",
        "for block in reversed(ownerless) if",
        "for block in ownerless if",
        CACHE,
    ),
    Mutant(
        "a double free is not noticed",
        f"{K}block_pool.py",
        "assert before - len(self._used) == len(ownerless)",
        "assert True",
        MANAGER,
    ),
    Mutant(
        "an owner is lost",
        f"{K}block_pool.py",
        "others[block] = num_others - 1",
        "del others[block]",
        SWAP + CACHE + RANDOM,
    ),
    Mutant("a revived block stays idle", f"{K}block_pool.py", "                del idle[block]\n", "", CACHE),
    Mutant(
        "a found block is not remembered as used",
        f"{K}block_pool.py",
        "self.labels_version += 1\n\n    def forget_labels",
        "pass\n\n    def forget_labels",
        CACHE + RANDOM,
    ),
    Mutant(
        "a fresh block is taken before an idle one",
        f"{K}block_pool.py",
        "num_fresh = max(0, num - len(self._idle))",
        "num_fresh = num",
        MANAGER + CACHE,
    ),
    Mutant("a hash ignores the parent", f"{K}hash_chain.py", "sha256(parent + ", "sha256(", CACHE),
    Mutant("a hash ignores the salt", f"{K}hash_chain.py", "sha256(salt.encode())", "sha256(b'')", CACHE),
    Mutant(
        "outputs are hashed at the wrong offset",
        f"{K}hash_chain.py",
        "max(0, start - split)",
        "max(1, start - split)",
        CACHE + RANDOM,
    ),
    Mutant(
        "a partial block is shared",
        f"{K}manager.py",
        "num_full = num_tokens // self.block_size",
        "num_full = -(-num_tokens // self.block_size)",
        SWAP,
    ),
    Mutant(
        "headroom is ignored",
        f"{K}manager.py",
        "num_tokens) + headroom)\n\n    def allocate",
        "num_tokens))\n\n    def allocate",
        MANAGER,
    ),
    Mutant("an idle hit is free", f"{K}manager.py", "- len(hits) + self.pool.count_idle(hits)", "- len(hits)", CACHE),
    Mutant(
        "a table grows by a block too few",
        f"{K}manager.py",
        "return -(-num_tokens // self.block_size)",
        "return num_tokens // self.block_size",
        MANAGER,
    ),
    Mutant(
        "blocks are freed before the step ends",
        f"{K}manager.py",
        "        if until_step is None:\n",
        "        if True:\n",
        SWAP,
    ),
    Mutant(
        "a step frees the blocks of the next",
        f"{K}manager.py",
        "self._pending_free[0][0] <= step_id",
        "self._pending_free[0][0] <= step_id + 1",
        SWAP,
    ),
    Mutant(
        "a sequence is lost by a failed copy",
        f"{K}manager.py",
        "stays_on_device = arrived ==",
        "stays_on_device = arrived !=",
        SWAP,
    ),
    Mutant(
        "an unpublished block is found",
        f"{K}prefix_cache.py",
        "num_full = min(num_computed_tokens, sequence.chain.num_tokens)",
        "num_full = sequence.chain.num_tokens",
        CACHE,
    ),
    Mutant(
        "a new table is not published",
        f"{K}prefix_cache.py",
        "            sequence.num_published = 0\n",
        "            pass\n",
        SWAP,
    ),
    Mutant(
        "hits are not counted",
        f"{K}prefix_cache.py",
        "self.total_hit_tokens += num_hit_blocks * self._block_size",
        "pass",
        CACHE,
    ),
    Mutant(
        "a match is never renewed",
        f"{K}prefix_cache.py",
        "if sequence.match_key != key:",
        "if sequence.match_key is None:",
        CACHE + RANDOM,
    ),
    Mutant("a full tier is taken", f"{K}swap.py", "if pool.can_take(num_blocks)", "if True", SWAP),
    Mutant(
        "the tier of an ended sequence is kept",
        f"{K}swap.py",
        "            self._release(self.swapped.pop(seq_id))\n        return False",
        "            self.swapped.pop(seq_id)\n        return False",
        SWAP,
    ),
    Mutant("an orphan stays in its tier", f"{K}swap.py", "and not transfer.is_orphan", "", SWAP),
)
