"""Blocks that were published without computing their names."""

from collections.abc import Sequence

from sageLLM.runtime.kv.hash_chain import HashChain, block_name, pack


class UnnamedBlocks:
    """Consecutive published blocks of a sequence, to be named when another sequence reaches them.

    Most blocks are never the prefix of another sequence, and hashing a block costs more than the rest of its life. A
    sequence can only match these blocks after the block before them, so that block's name (`parent`) is the key under
    which they wait. `num_left` counts the blocks that are neither named nor evicted.

    The tokens are read from the chain of the sequence until it ends, then from a tuple: the garbage collector traverses
    no tuple of integers, and packing them, which most blocks never need, would take 20 times as long as the copy.
    """

    __slots__ = ("_block_size", "_chain", "_index", "_start", "_tokens", "blocks", "num_left", "parent", "waiting")

    def __init__(
        self,
        parent: bytes,
        blocks: list[int],
        chain: HashChain,
        index: int,
        block_size: int,
        waiting: "dict[bytes, UnnamedBlocks]",
    ) -> None:
        self.parent = parent
        self.blocks = blocks
        self.num_left = 0
        self.waiting = waiting
        self._chain: HashChain | None = chain
        self._index = self._start = index  # in the sequence: of the first block left, of `blocks[0]`
        self._block_size = block_size
        self._tokens: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The index in the sequence of the block after the last one."""
        return self._start + len(self.blocks)

    def name_first(self) -> tuple[int, bytes]:
        """Remove the first block; returns it with its name, which is the parent of the rest."""
        at = self._index - self._start
        if self._chain is not None:
            self.parent = self._chain.name(self._index)
        else:
            size = self._block_size
            self.parent = block_name(self.parent, pack(self._tokens[size * at : size * (at + 1)]))
        self._index += 1
        return self.blocks[at], self.parent

    @property
    def is_waiting(self) -> bool:
        """Whether the blocks can be found; not after a reset of the prefix cache."""
        return self.waiting.get(self.parent) is self

    @property
    def is_empty(self) -> bool:
        """Whether no block is left."""
        return self.num_left == 0 or self._index == self.end

    def extend(self, blocks: Sequence[int], num_claimed: int) -> None:
        """Append the blocks after the last one."""
        self.blocks += blocks
        self.num_left += num_claimed

    def release_tokens(self) -> None:
        """The sequence has ended: copy the tokens, and drop the lists of the sequence."""
        if self._chain is not None:
            self._tokens = self._chain.tokens(self._start * self._block_size, self.end * self._block_size)
            self._chain = None

    def replace_block(self, old: int, new: int) -> None:
        """The contents of a block have moved to another one."""
        self.blocks[self.blocks.index(old)] = new

    def lose_block(self) -> None:
        """One of the blocks was evicted; without blocks there is nothing to find."""
        self.num_left -= 1
        if self.num_left == 0 and self.is_waiting:
            del self.waiting[self.parent]
