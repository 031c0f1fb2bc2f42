"""Prefix cache: matches the beginning of a sequence with blocks that already hold its KV."""

from collections.abc import Sequence

from sageLLM.runtime.kv.block_pool import BlockPool
from sageLLM.runtime.kv.events import KVEventLog
from sageLLM.runtime.kv.hash_chain import HashChain
from sageLLM.runtime.kv.unnamed_blocks import UnnamedBlocks


class TrackedSequence(HashChain):
    """A tracked sequence: its block names, what is published of its table, and its last match.

    `unnamed` are the last published blocks, if they have no names yet.
    """

    __slots__ = ("match", "match_key", "num_published", "unnamed")

    def __init__(self, block_size: int, prompt: Sequence[int], outputs: Sequence[int], salt: str) -> None:
        super().__init__(block_size, prompt, outputs, salt)
        self.num_published = 0
        self.unnamed: UnnamedBlocks | None = None
        self.match: list[int] = []
        self.match_key: tuple[int, int] | None = None


class PrefixCache:
    """Matches sequences with the labelled blocks of a pool.

    A match is a run of full blocks from the start of the sequence. At least the last token is always computed, because
    its logits are required, so a sequence that is cached as a whole matches one block less. Only published blocks
    match, and a block is published when it is full.

    A published block is labelled with its name if a lookup has computed the name anyway. The blocks after it wait in
    `_unnamed` until a sequence reaches them, or until equal blocks may be published: at most one sequence waits after
    each name, and only if no block after that name has one. So of equal blocks one is cached, as if all had names.
    (Two can be where the block before them was evicted and computed again; the next lookup drops one.)
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._sequences: dict[str, TrackedSequence] = {}
        self._unnamed: dict[bytes, UnnamedBlocks] = {}  # by the name of the block before them
        self._log: KVEventLog | None = None
        self.total_queried_tokens = 0
        self.total_hit_tokens = 0

    def record(self, log: KVEventLog) -> None:
        """Logs the blocks that can be found; each is then named when it is published."""
        self._log = self._pool.log = log
        log.clear()

    def track(self, seq_id: str, prompt: Sequence[int], outputs: Sequence[int], salt: str) -> None:
        """Starts to track a sequence by its live token lists, which may only grow at the end."""
        self._sequences[seq_id] = TrackedSequence(self._block_size, prompt, outputs, salt)

    def forget(self, seq_id: str) -> None:
        """Stops tracking a sequence; its published blocks can still be found."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None and sequence.unnamed is not None:
            sequence.unnamed.release_tokens()

    def match(self, seq_id: str) -> list[int]:
        """The blocks that hold the beginning of the sequence.

        The match is remembered until a label is added or dropped, since a waiting request is matched in every step.
        """
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return []
        key = (self._pool.labels_version, sequence.num_tokens)
        if sequence.match_key != key:
            sequence.match = self._walk(sequence)
            sequence.match_key = key
        return sequence.match

    def num_matching(self, chain: HashChain) -> int:
        """The number of blocks that hold the beginning of a sequence that is not tracked."""
        return len(self._walk(chain))

    def _walk(self, chain: HashChain) -> list[int]:
        find, blocks = self._pool.find, list[int]()
        for index in range((chain.num_tokens - 1) // self._block_size):  # without the last token, which is computed
            name = chain.name(index)
            block = find(name)
            if block is None:
                parent = chain.name(index - 1)
                if parent not in self._unnamed:
                    break
                self._name_one_after(parent)
                block = find(name)
                if block is None:
                    break
            blocks.append(block)
        return blocks

    def count_query(self, seq_id: str, num_hit_blocks: int) -> None:
        """Counts the hits of an admitted sequence, and marks these blocks of its table as published."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            sequence.num_published = num_hit_blocks
            self.total_queried_tokens += sequence.num_tokens
            self.total_hit_tokens += num_hit_blocks * self._block_size

    def publish(self, seq_id: str, table: Sequence[int], num_computed_tokens: int) -> None:
        """Lets other sequences find the full blocks of the table."""
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        # A step in flight may have computed a token that is not in the lists yet; its block is not named yet.
        num_full = min(num_computed_tokens, sequence.num_tokens) // self._block_size
        if num_full > sequence.num_published:
            self._publish(sequence, list(table[sequence.num_published : num_full]))
            sequence.num_published = num_full

    def _publish(self, sequence: TrackedSequence, blocks: list[int]) -> None:
        """Publishes the next blocks of a sequence. Hashes as few as possible."""
        pool, first = self._pool, sequence.num_published
        is_new = not pool.has_labels(blocks)  # a fork may share blocks that its parent has published
        unnamed = sequence.unnamed
        if unnamed is not None and unnamed.is_waiting:
            if is_new:
                unnamed.extend(blocks, pool.claim(blocks, unnamed))
                return
            while unnamed.is_waiting:
                self._name_one_after(unnamed.parent)
        has_duplicates = True  # other blocks after the parent may have names
        parent = sequence.name(first - 1)
        for index in range(first, first + len(blocks)):
            is_awaited = parent in self._unnamed
            is_lazy = self._log is None and not (has_duplicates or is_awaited)
            if is_new and is_lazy and index >= sequence.num_named:
                unnamed = UnnamedBlocks(
                    parent, blocks[index - first :], sequence, index, self._block_size, self._unnamed
                )
                unnamed.num_left = pool.claim(unnamed.blocks, unnamed)
                sequence.unnamed = self._unnamed[parent] = unnamed
                return
            if is_awaited:
                self._name_one_after(parent)
            before, parent = parent, sequence.name(index)
            has_duplicates = not pool.label(blocks[index - first], parent)
            if self._log is not None and not has_duplicates:
                start = index * self._block_size
                token_ids = sequence.tokens(start, start + self._block_size)
                self._log.store(parent, before if index else None, token_ids)

    def _name_one_after(self, parent: bytes) -> None:
        """Names the first block of those that wait after this name; the rest waits after its name."""
        first = self._unnamed.pop(parent, None)
        moving = [] if first is None else [first]
        while moving:
            unnamed = moving.pop()
            block, name = unnamed.name_first()
            unnamed.num_left -= self._pool.settle(block, unnamed, name)
            if unnamed.is_empty:
                continue
            other = self._unnamed.pop(name, None)
            if other is None:
                self._unnamed[name] = unnamed
            else:  # equal blocks may follow: both are named one block further
                moving += [unnamed, other]

    def drop_table(self, seq_id: str) -> None:
        """The sequence has lost its blocks: what was published stays, and its next table is published again."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            sequence.num_published = 0
            if sequence.unnamed is not None:
                sequence.unnamed.release_tokens()
                sequence.unnamed = None

    def reset(self) -> None:
        """Forgets the contents of all blocks."""
        self._unnamed.clear()
        self._pool.forget_labels()
