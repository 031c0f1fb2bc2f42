"""Placement of the KV of running requests: one pool, or the prefill worker's pool and then the decode worker's.

With two pools a request gets its blocks in both when it is admitted: those of the decode pool are a reservation until
its KV is copied there. So prefill never runs ahead of the capacity of the decode worker, and a copy never waits for
space (which could deadlock: both pools full, each waiting for the other).
"""

from collections.abc import Collection

from sageLLM.runtime.kv.copies import Admission, BlockCopy, TierCopy
from sageLLM.runtime.kv.manager import DEFAULT_BLOCK_SIZE, PagedKVManager
from sageLLM.runtime.scheduler.batch import KVBudget, KVMigration
from sageLLM.runtime.scheduler.request import Request


class KVPlacement:
    """Block tables of all running requests, over one pool or (`is_split`) two.

    `request.kv_block_ids` is always the live table in the pool of the worker that the request currently runs on.
    Released blocks collect in `freed` and `freed_prefill` until they are announced to the engine.
    """

    def __init__(self, budget: KVBudget | None, is_split: bool, enable_prefix_caching: bool = False) -> None:
        num_blocks = budget.num_blocks if budget else None
        num_prefill_blocks = budget.num_prefill_blocks if budget else None
        block_size = budget.block_size if budget else DEFAULT_BLOCK_SIZE
        self.decode = PagedKVManager(
            num_blocks,
            block_size,
            enable_prefix_caching=enable_prefix_caching and not is_split,  # prompts are cached where they are computed
            lower_blocks=budget.num_lower_blocks if budget else 0,
            host_blocks=budget.num_host_blocks if budget else 0,
            disk_blocks=budget.num_disk_blocks if budget else 0,
        )
        self.prefill = self.decode
        if is_split:
            num_blocks = num_blocks if num_prefill_blocks is None else num_prefill_blocks
            self.prefill = PagedKVManager(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.is_split = is_split
        self.block_size = block_size
        self.freed: list[int] = []
        self.freed_prefill: list[int] = []
        # Requests with a reservation in the decode pool that the engine has not heard of yet.
        self._unannounced: set[str] = set()

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that fits every pool when it is alone; None when the pools are unbounded."""
        limits = [kv.max_tokens for kv in (self.prefill, self.decode) if kv.max_tokens is not None]
        return min(limits, default=None)

    def holds(self, request_id: str) -> bool:
        """Whether the request has blocks in any pool."""
        return self.decode.holds(request_id) or self.prefill.holds(request_id)

    def track(self, request: Request) -> None:
        """Register a request's tokens with the prefix cache."""
        self.prefill.track(request.request_id, request.prompt_token_ids, request.output_token_ids, request.kv_salt)

    def track_as(self, request: Request, is_long: bool | None) -> None:
        """Register a request without blocks again if `is_long` has changed."""
        if request.is_long is not is_long:
            request.is_long = is_long
            self.forget(request)
            self.track(request)

    def forget(self, request: Request) -> None:
        """Unregister a request that has ended and holds no blocks."""
        self.prefill.forget(request.request_id)

    def can_admit(self, request: Request, num_tokens: int, headroom: int) -> bool:
        """Whether `admit` would succeed and leave `headroom` free blocks for the running decodes."""
        if not self.is_split:
            return self.decode.can_admit(request.request_id, num_tokens, headroom)
        has_room = self.prefill.can_admit(request.request_id, request.total_tokens)
        return has_room and self.decode.can_allocate(request.request_id, num_tokens, headroom)

    def admit(self, request: Request, num_tokens: int) -> Admission:
        """Allocate blocks for a request's tokens, and for `num_tokens` tokens on the worker that will decode it."""
        if self.is_split:
            self.decode.allocate(request.request_id, num_tokens)
            self._unannounced.add(request.request_id)
            num_tokens = request.total_tokens
        admission = self.prefill.admit(request.request_id, num_tokens)
        request.kv_block_ids = self.prefill.block_table(request.request_id)
        return admission

    def publish(self, request: Request) -> None:
        """Let other requests share the full computed blocks, in the pool where they were prefilled."""
        self.prefill.publish(request.request_id, request.num_computed_tokens)

    def can_extend(self, request: Request, num_tokens: int) -> bool:
        """Whether a decoding request's table can grow to `num_tokens` tokens."""
        return self.decode.can_allocate(request.request_id, num_tokens)

    def extend(self, request: Request, num_tokens: int) -> list[int]:
        """Grow a decoding request's table to `num_tokens` tokens; returns the new blocks."""
        return self.decode.allocate(request.request_id, num_tokens)

    def take_each(self, num_requests: int) -> list[int] | None:
        """Take a block for each of so many decoding requests; None, and no change, if too few are free.

        The caller appends them to `request.kv_block_ids`.
        """
        return self.decode.take_blocks(num_requests)

    # --- forks and swaps, on the worker that decodes ---

    def fork(self, parent: Request, child: Request, num_reserved: int) -> tuple[list[int], list[BlockCopy]] | None:
        """Share the computed tokens of `parent` with `child`, in a table for `num_reserved` tokens.

        Returns the blocks that are new in it and the copies that it needs, or None when too few blocks are free.
        """
        num_tokens = parent.num_computed_tokens
        # Full blocks are shared; the last, partial one is copied, as both requests will write to it.
        num_missing = self.decode.blocks_for(num_reserved) - num_tokens // self.block_size
        if self.is_split or not self.decode.pool.can_take(num_missing):
            return None
        fork = self.decode.fork(parent.request_id, child.request_id, num_tokens)
        child.kv_block_ids = self.decode.block_table(child.request_id)
        return fork.new_blocks + self.decode.allocate(child.request_id, num_reserved), fork.copies

    def swap_out(self, request: Request, num_tokens: int) -> TierCopy | None:
        """Begin to copy the first `num_tokens` tokens of a decoding request to a tier; None when every tier is full."""
        return self.decode.begin_swap_out(request.request_id, num_tokens)

    def swap_in(self, request: Request, num_tokens: int) -> tuple[TierCopy, list[int]]:
        """Begin to copy a request back, into a table for `num_tokens` tokens; returns the copy and the table."""
        copy = self.decode.begin_swap_in(request.request_id, num_tokens)
        request.kv_block_ids = self.decode.block_table(request.request_id)
        return copy, list(request.kv_block_ids)

    def finish_swap(self, request_id: str) -> None:
        """Commit a copy between tiers: free its source blocks."""
        if self.decode.is_in_transfer(request_id):
            self.freed += self.decode.finish_swap(request_id)

    def abort_swap(self, request_id: str) -> list[int]:
        """Undo a copy between tiers that failed or never began; returns the device blocks that become unused."""
        return self.decode.abort_swap(request_id) if self.decode.is_in_transfer(request_id) else []

    def release_swapped(self, request: Request) -> None:
        """Free the blocks that a waiting request has in a tier, or will have when its copy ends."""
        self.freed += self.decode.free(request.request_id)

    # --- two pools ---

    def copy_of(self, request_id: str, start: int, num_tokens: int, attempt: int) -> KVMigration:
        """The copy of these tokens to the decode pool; `start` is a multiple of the block size."""
        blocks = slice(start // self.block_size, self.decode.blocks_for(start + num_tokens))
        source = self.prefill.block_table(request_id)[blocks]
        return KVMigration(request_id, source, self.decode.block_table(request_id)[blocks], num_tokens, start, attempt)

    def is_target_announced(self, request_id: str) -> bool:
        """Whether the engine has heard of the request's blocks in the decode pool."""
        return request_id not in self._unannounced

    def announce_target(self, request_id: str) -> list[int]:
        """The request's blocks in the decode pool, which count as announced from now on."""
        self._unannounced.discard(request_id)
        return list(self.decode.block_table(request_id))

    def retract_target(self, request_id: str) -> None:
        """Count the blocks in the decode pool as unannounced: the step that held them was rolled back."""
        self._unannounced.add(request_id)

    def arrive(self, request: Request) -> None:
        """Free the source of a complete copy and switch the request to the decode pool."""
        self.freed_prefill += self.prefill.free(request.request_id)
        request.kv_block_ids = self.decode.block_table(request.request_id)

    def release(self, request: Request, unannounced: Collection[int] = ()) -> list[int]:
        """Free all blocks of a request; its full blocks stay in the prefix cache.

        `unannounced` blocks were allocated in the step being planned. Those of them that other requests share stay
        allocated and must still be announced: they are returned.
        """
        request_id = request.request_id
        self.prefill.publish(request_id, request.num_computed_tokens)
        shared: list[int] = []
        if self.is_split and self.prefill.holds(request_id):
            freed = self.prefill.free(request_id)
            self.freed_prefill += [block for block in freed if block not in unannounced]
            shared = [block for block in unannounced if block not in freed]
            unannounced = ()  # they are blocks of the prefill pool; the numbers mean others in the decode pool
        freed = self.decode.free(request_id)
        if request_id in self._unannounced:
            self._unannounced.remove(request_id)
        else:
            self.freed += [block for block in freed if block not in unannounced] if unannounced else freed
        request.kv_block_ids = []
        if unannounced:
            shared = [block for block in unannounced if block not in freed]
        return shared

    def check_integrity(self, live: Collection[str]) -> None:
        """Check the pools, and that exactly the `live` requests have tables."""
        self.decode.check_integrity(live)
        if self.is_split:
            self.prefill.check_integrity()
            assert all(self.decode.holds(i) for i in self._unannounced), "a reservation must hold blocks"
