"""KV block pool of the running-first policy: reference counts, and a prefix cache that includes uncomputed blocks.

It differs from `runtime/kv` on purpose, to make the decisions of vLLM's v1: a full block can be shared as soon as it is
scheduled (not only once it is computed), equal blocks are kept as duplicates, and free blocks are reused in the order
in which they became free, the last block of a sequence before its first.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from sageLLM.runtime.scheduler.request import Request


class SharedBlockPool:
    """Pool of `num_blocks` blocks of `block_size` tokens. An unused block is free and keeps its content until reuse."""

    def __init__(self, num_blocks: int, block_size: int, is_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.is_caching = is_caching
        self.num_users = [0] * num_blocks
        self._free: dict[int, None] = dict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._blocks_of: dict[bytes, dict[int, None]] = {}
        self._hashes: dict[str, list[bytes]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def find_prefix(self, request: Request) -> list[int]:
        """The cached blocks of the longest prefix of the request; at least one token is left to compute."""
        if not self.is_caching:
            return []
        blocks: list[int] = []
        hashes = self._hashes_up_to(request, (request.total_tokens - 1) // self.block_size)
        for block_hash in hashes:
            found = self._blocks_of.get(block_hash)
            if not found:
                break
            blocks.append(next(iter(found)))
        return blocks

    def num_needed(self, table: Sequence[int], hits: Sequence[int], num_tokens: int) -> int:
        """Number of free blocks needed to cover `num_tokens` tokens: new ones, and unused hits."""
        num_blocks = -(-num_tokens // self.block_size)
        return max(0, num_blocks - len(table) - len(hits)) + sum(not self.num_users[block] for block in hits)

    def extend(self, request: Request, hits: Sequence[int], num_tokens: int) -> list[int]:
        """Append `hits` and new blocks to the request's table until it covers `num_tokens`; returns the new ones."""
        table = request.kv_block_ids
        for block in hits:
            self._free.pop(block, None)
            self.num_users[block] += 1
        table.extend(hits)
        num_new = max(0, -(-num_tokens // self.block_size) - len(table))
        new_blocks = [self._take() for _ in range(num_new)]
        table.extend(new_blocks)
        if self.is_caching:
            self._remember(request, min(num_tokens, request.total_tokens) // self.block_size)
        return new_blocks

    def release(self, request: Request) -> list[int]:
        """Release the request's blocks, the last one first; returns those that become free."""
        freed = []
        for block in reversed(request.kv_block_ids):
            self.num_users[block] -= 1
            if self.num_users[block] == 0:
                self._free[block] = None
                freed.append(block)
        request.kv_block_ids = []
        return freed

    def forget(self, request: Request) -> None:
        """Drop the hashes of a request that has ended."""
        self._hashes.pop(request.request_id, None)

    def _take(self) -> int:
        block = next(iter(self._free))
        del self._free[block]
        self.num_users[block] = 1
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            duplicates = self._blocks_of[block_hash]
            del duplicates[block]
            if not duplicates:
                del self._blocks_of[block_hash]
        return block

    def _remember(self, request: Request, num_full: int) -> None:
        hashes = self._hashes_up_to(request, num_full)
        table = request.kv_block_ids
        for index in range(num_full - 1, -1, -1):
            block = table[index]
            if block in self._hash_of:
                break
            self._hash_of[block] = hashes[index]
            self._blocks_of.setdefault(hashes[index], {})[block] = None

    def _hashes_up_to(self, request: Request, num_full: int) -> list[bytes]:
        """SHA-256 of each block's tokens chained with the previous hash, for the first `num_full` blocks."""
        hashes = self._hashes.setdefault(request.request_id, [])
        if len(hashes) < num_full:
            tokens = request.prompt_token_ids + request.output_token_ids
            for index in range(len(hashes), num_full):
                part = array("q", tokens[index * self.block_size : (index + 1) * self.block_size])
                parent = hashes[-1] if hashes else b""
                hashes.append(hashlib.sha256(parent + part.tobytes()).digest())
        return hashes[:num_full]

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Check the reference counts, and that exactly the unused blocks are free."""
        counts = [0] * self.num_blocks
        for request in running:
            for block in request.kv_block_ids:
                counts[block] += 1
        assert counts == self.num_users, "wrong reference count of a block"
        assert self._free.keys() == {b for b, n in enumerate(counts) if n == 0}, (
            "the free list must hold exactly the unused blocks"
        )
        for block, block_hash in self._hash_of.items():
            assert block in self._blocks_of[block_hash], "a cached block cannot be found by its hash"
