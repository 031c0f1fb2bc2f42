"""Where the KV of running requests lies: in one pool, or first in the prefill worker's and then in the decode worker's.

With two pools a request gets its blocks in both when it is admitted: those of the decode pool stay reserved until its
KV is copied there, so prefill never runs ahead of what the decode worker can take, and a copy never waits for room.
"""

from collections.abc import Collection

from sageLLM.runtime.kv.copies import Admission, BlockCopy, TierCopy
from sageLLM.runtime.kv.manager import DEFAULT_BLOCK_SIZE, PagedKVManager
from sageLLM.runtime.scheduler.base import KVBudget, KVMigration, Request


class KVPlacement:
    """The block tables of all running requests, over one pool or (`is_split`) two.

    `request.kv_block_ids` is always the live table in the pool of the worker that the request now runs on. Returned
    blocks gather in `freed` and `freed_prefill` until they are announced to the engine.
    """

    def __init__(self, budget: KVBudget | None, is_split: bool, enable_prefix_caching: bool = False) -> None:
        num_blocks = budget.num_blocks if budget else None
        num_prefill_blocks = budget.num_prefill_blocks if budget else None
        block_size = budget.block_size if budget else DEFAULT_BLOCK_SIZE
        caches_there = enable_prefix_caching and not is_split
        self.decode = PagedKVManager(
            num_blocks,
            block_size,
            enable_prefix_caching=caches_there,
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
        # Reservations in the decode pool of which the engine has not heard yet.
        self._silent: set[str] = set()

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that fits in every pool when it is alone there; None when they are unbounded."""
        limits = [kv.max_tokens for kv in (self.prefill, self.decode) if kv.max_tokens is not None]
        return min(limits, default=None)

    def holds(self, request_id: str) -> bool:
        """Whether the request has blocks in any pool."""
        return self.decode.holds(request_id) or self.prefill.holds(request_id)

    def track(self, request: Request) -> None:
        """Let the prefix cache know a request's tokens."""
        self.prefill.track(request.request_id, request.prompt_token_ids, request.output_token_ids, request.salt)

    def forget(self, request: Request) -> None:
        """A request has ended and holds no blocks any more."""
        self.prefill.forget(request.request_id)

    def can_admit(self, request: Request, num_tokens: int, headroom: int) -> bool:
        """Whether `admit` would succeed and leave `headroom` blocks to the running decodes."""
        if not self.is_split:
            return self.decode.can_admit(request.request_id, num_tokens, headroom)
        has_room = self.prefill.can_admit(request.request_id, request.total_tokens)
        return has_room and self.decode.can_allocate(request.request_id, num_tokens, headroom)

    def admit(self, request: Request, num_tokens: int) -> Admission:
        """Give a request blocks for its tokens, and for `num_tokens` where it will decode."""
        if self.is_split:
            self.decode.allocate(request.request_id, num_tokens)
            self._silent.add(request.request_id)
            num_tokens = request.total_tokens
        admission = self.prefill.admit(request.request_id, num_tokens)
        request.kv_block_ids = self.prefill.block_table(request.request_id)
        return admission

    def publish(self, request: Request) -> None:
        """Let others share the blocks that the request has filled, where it was prefilled."""
        self.prefill.publish(request.request_id, request.num_computed_tokens)

    def can_extend(self, request: Request, num_tokens: int) -> bool:
        """Whether a decoding request's table can grow to `num_tokens` tokens."""
        return self.decode.can_allocate(request.request_id, num_tokens)

    def extend(self, request: Request, num_tokens: int) -> list[int]:
        """Grow a decoding request's table to `num_tokens` tokens; returns the new blocks."""
        return self.decode.allocate(request.request_id, num_tokens)

    def extend_each(self, request_ids: list[str]) -> list[int] | None:
        """Give each of these decoding requests one block, in one go; None, and no change, if too few are free."""
        return self.decode.append_blocks(request_ids)

    # --- forks and swaps, on the worker that decodes ---

    def fork(self, parent: Request, child: Request, num_reserved: int) -> tuple[list[int], list[BlockCopy]] | None:
        """Give `child` the computed tokens of `parent`, in a table for `num_reserved` tokens.

        Returns the blocks that are new in it and the copies that it needs, or None when there are too few blocks.
        """
        num_tokens = parent.num_computed_tokens
        num_missing = self.decode.blocks_for(num_reserved) - num_tokens // self.block_size
        if self.is_split or not self.decode.pool.can_take(num_missing):
            return None
        fork = self.decode.fork(parent.request_id, child.request_id, num_tokens)
        child.kv_block_ids = self.decode.block_table(child.request_id)
        return fork.new_blocks + self.decode.allocate(child.request_id, num_reserved), fork.copies

    def swap_out(self, request: Request, num_tokens: int) -> TierCopy | None:
        """Begin to copy the first `num_tokens` tokens of a decoding request to a tier; None when no tier has room."""
        return self.decode.begin_swap_out(request.request_id, num_tokens)

    def swap_in(self, request: Request, num_tokens: int) -> tuple[TierCopy, list[int]]:
        """Begin to copy a request back, into a table for `num_tokens` tokens; returns the table as well."""
        copy = self.decode.begin_swap_in(request.request_id, num_tokens)
        request.kv_block_ids = self.decode.block_table(request.request_id)
        return copy, list(request.kv_block_ids)

    def finish_swap(self, request_id: str) -> None:
        """A copy between tiers has arrived."""
        if self.decode.is_in_transfer(request_id):
            self.freed += self.decode.finish_swap(request_id)

    def abort_swap(self, request_id: str) -> list[int]:
        """A copy between tiers has failed, or was never begun; returns the device blocks that nobody uses any more."""
        return self.decode.abort_swap(request_id) if self.decode.is_in_transfer(request_id) else []

    def release_swapped(self, request: Request) -> None:
        """Give back what a waiting request has in a tier, or will have when the copy under way ends."""
        self.freed += self.decode.free(request.request_id)

    # --- two pools ---

    def copy_of(self, request_id: str, start: int, num_tokens: int, attempt: int) -> KVMigration:
        """The copy of these tokens to the decode pool; `start` is the beginning of a block."""
        blocks = slice(start // self.block_size, self.decode.blocks_for(start + num_tokens))
        source = self.prefill.block_table(request_id)[blocks]
        return KVMigration(request_id, source, self.decode.block_table(request_id)[blocks], num_tokens, start, attempt)

    def is_target_known(self, request_id: str) -> bool:
        """Whether the engine has heard of the request's blocks in the decode pool."""
        return request_id not in self._silent

    def announce_target(self, request_id: str) -> list[int]:
        """The request's blocks in the decode pool, of which the engine hears now."""
        self._silent.discard(request_id)
        return list(self.decode.block_table(request_id))

    def forget_target(self, request_id: str) -> None:
        """The engine has not heard of the blocks in the decode pool after all."""
        self._silent.add(request_id)

    def arrive(self, request: Request) -> None:
        """The copy is complete: free the source and run on the decode pool."""
        self.freed_prefill += self.prefill.free(request.request_id)
        request.kv_block_ids = self.decode.block_table(request.request_id)

    def release(self, request: Request, unannounced: Collection[int] = ()) -> list[int]:
        """Return all blocks of a request; what it filled stays in the prefix cache.

        `unannounced` ones were given within the step that is being planned. Returns those of them that others use: they
        are to be announced all the same.
        """
        request_id = request.request_id
        self.publish(request)
        shared: list[int] = []
        if self.is_split and self.prefill.holds(request_id):
            freed = self.prefill.free(request_id)
            self.freed_prefill += [block for block in freed if block not in unannounced]
            shared = [block for block in unannounced if block not in freed]
            unannounced = ()
        freed = self.decode.free(request_id)
        if request_id not in self._silent:
            self.freed += [block for block in freed if block not in unannounced]
        self._silent.discard(request_id)
        request.kv_block_ids = []
        return shared or [block for block in unannounced if block not in freed]

    def check_integrity(self, live: Collection[str]) -> None:
        """Check the pools, and that exactly the `live` requests have tables."""
        self.decode.check_integrity(live)
        if self.is_split:
            self.prefill.check_integrity()
            assert all(self.decode.holds(request_id) for request_id in self._silent), "a reservation without blocks"
