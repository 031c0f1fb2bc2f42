"""Prefix cache: matches the beginning of a sequence with blocks that already hold its KV."""

from collections.abc import Sequence

from sageLLM.runtime.kv.block_pool import BlockPool
from sageLLM.runtime.kv.hash_chain import HashChain


class TrackedSequence:
    """A tracked sequence: its block names, the number of published blocks of its table, and its last match."""

    __slots__ = ("chain", "match", "match_key", "num_published")

    def __init__(self, chain: HashChain) -> None:
        self.chain = chain
        self.num_published = 0
        self.match: list[int] = []
        self.match_key: tuple[int, int] | None = None


class OutputBlocks:
    """Full blocks of an ended sequence with output tokens alone, hashed when another sequence reaches them.

    Most outputs are never the prefix of a prompt, and hashing a block costs more than the rest of its life. A sequence
    can only match these blocks after the block before them, so that block's name is the place to look for them.
    """

    __slots__ = ("blocks", "chain", "first", "num_left", "waiting")

    def __init__(self, chain: HashChain, first: int, blocks: Sequence[int]) -> None:
        self.chain = chain
        self.first = first
        self.blocks = blocks
        self.num_left = 0
        self.waiting: dict[bytes, list[OutputBlocks]] = {}

    @property
    def parent(self) -> bytes:
        """The name of the block before the first one."""
        return self.chain.name(self.first - 1) if self.first else self.chain.root

    def lose_block(self) -> None:
        """One of the blocks was evicted; without blocks there is nothing to find."""
        self.num_left -= 1
        if self.num_left == 0:
            same = self.waiting.get(self.parent, [])
            if self in same:
                same.remove(self)
            if not same:
                self.waiting.pop(self.parent, None)


class PrefixCache:
    """Matches sequences with the labelled blocks of a pool.

    A match is a run of full blocks from the start of the sequence. At least the last token is always computed, because
    its logits are required, so a sequence that is cached as a whole matches one block less. Only published blocks
    match, and a block is published when it is full.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._sequences: dict[str, TrackedSequence] = {}
        self._unhashed: dict[bytes, list[OutputBlocks]] = {}  # by the name of the block before them
        self.total_queried_tokens = 0
        self.total_hit_tokens = 0

    def track(self, seq_id: str, prompt: Sequence[int], outputs: Sequence[int], salt: str) -> None:
        """Starts to track a sequence by its live token lists, which may only grow at the end."""
        self._sequences[seq_id] = TrackedSequence(HashChain(self._block_size, prompt, outputs, salt))

    def forget(self, seq_id: str) -> None:
        """Stops tracking a sequence; its published blocks can still be found."""
        self._sequences.pop(seq_id, None)

    def match(self, seq_id: str) -> list[int]:
        """The blocks that hold the beginning of the sequence.

        The match is remembered until a label is added or dropped, since a waiting request is matched in every step.
        """
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return []
        key = (self._pool.labels_version, sequence.chain.num_tokens)
        if sequence.match_key != key:
            sequence.match = self._walk(sequence.chain)
            sequence.match_key = key
        return sequence.match

    def _walk(self, chain: HashChain) -> list[int]:
        blocks = []
        for index in range((chain.num_tokens - 1) // self._block_size):  # without the last token, which is computed
            block = self._pool.find(chain.name(index))
            if block is None and self._unhashed:
                self._hash_outputs_after(chain.name(index - 1) if index else chain.root)
                block = self._pool.find(chain.name(index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _hash_outputs_after(self, name: bytes) -> None:
        for outputs in self._unhashed.pop(name, ()):
            for index, block in enumerate(outputs.blocks, outputs.first):
                self._pool.settle(block, outputs, outputs.chain.name(index))

    def count_query(self, seq_id: str, num_hit_blocks: int) -> None:
        """Counts the hits of an admitted sequence, and marks these blocks of its table as published."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            sequence.num_published = num_hit_blocks
            self.total_queried_tokens += sequence.chain.num_tokens
            self.total_hit_tokens += num_hit_blocks * self._block_size

    def publish(self, seq_id: str, table: Sequence[int], num_computed_tokens: int) -> None:
        """Labels the full blocks of the table, so that other sequences find them."""
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        # A step in flight may have computed a token that is not in the lists yet; its block is not named yet.
        num_full = min(num_computed_tokens, sequence.chain.num_tokens) // self._block_size
        for index in range(sequence.num_published, num_full):
            self._pool.label(table[index], sequence.chain.name(index))
        sequence.num_published = max(sequence.num_published, num_full)

    def publish_ended(self, seq_id: str, table: Sequence[int], num_computed_tokens: int) -> None:
        """`publish` for a sequence that grows no more: its outputs are hashed only when another sequence reaches them.

        It keeps the token lists until then, or until the blocks are evicted.
        """
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        chain = sequence.chain
        num_full = min(num_computed_tokens, chain.num_tokens) // self._block_size
        first = max(sequence.num_published, chain.num_prompt_blocks)
        self.publish(seq_id, table, min(num_full, first) * self._block_size)
        if num_full <= first:
            return
        outputs = OutputBlocks(chain, first, table[first:num_full])
        outputs.num_left = self._pool.claim(outputs.blocks, outputs)
        if outputs.num_left:
            outputs.waiting = self._unhashed
            self._unhashed.setdefault(outputs.parent, []).append(outputs)
        sequence.num_published = num_full

    def reset(self) -> None:
        """Forgets the contents of all blocks."""
        self._unhashed.clear()
        self._pool.forget_labels()

    def drop_table(self, seq_id: str) -> None:
        """Forgets what was published of a sequence that has lost its blocks: its next table is published again."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            sequence.num_published = 0
