"""Hash chain over full blocks of tokens: equal prefixes have equal block names.

    name(i) = SHA-256(name(i - 1), tokens of block i),   name(-1) = SHA-256(salt)

Equal names therefore mean equal tokens from the start of the sequence and an equal salt. A salt (a tenant, an adapter)
separates sequences that must not share KV. The hash is cryptographic because a collision, which a user could
construct for a weak hash, would serve one user's KV to another.
"""

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256


class HashChain:
    """The names of one sequence's full blocks, each computed on first use.

    The token lists are live: outputs may grow at the end, and nothing else may change.
    """

    __slots__ = ("_block_size", "_names", "_outputs", "_prompt", "root")

    def __init__(self, block_size: int, prompt: Sequence[int], outputs: Sequence[int], salt: str = "") -> None:
        self._block_size = block_size
        self._prompt = prompt
        self._outputs = outputs
        self._names: list[bytes] = []
        self.root = _root_of(salt)  # the name before the first block

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self._prompt) + len(self._outputs)

    @property
    def num_named(self) -> int:
        """The number of blocks with a computed name."""
        return len(self._names)

    def name(self, index: int) -> bytes:
        """The name of block `index`, which must be full; -1 is the root."""
        names = self._names
        if index < len(names):
            return names[index] if index >= 0 else self.root
        size = self._block_size
        name = names[-1] if names else self.root
        for start in range(len(names) * size, (index + 1) * size, size):
            name = block_name(name, pack(self.tokens(start, start + size)))
            names.append(name)
        return name

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens `start .. end - 1` of prompt + outputs, which must exist."""
        split = len(self._prompt)
        if end <= split:
            return tuple(self._prompt[start:end])
        if start >= split:
            return tuple(self._outputs[start - split : end - split])
        return (*self._prompt[start:], *self._outputs[: end - split])


def block_name(parent: bytes, tokens: bytes) -> bytes:
    """The name of a block with these packed tokens after the block named `parent`."""
    return sha256(parent + tokens).digest()


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes of a fixed width: [1, 23] and [12, 3] must differ."""
    return _packer(len(tokens))(*tokens)


@lru_cache(maxsize=1024)
def _packer(num_tokens: int) -> Callable[..., bytes]:
    """The function that packs this number of tokens."""
    return struct.Struct(f"<{num_tokens}q").pack


@lru_cache(maxsize=256)
def _root_of(salt: str) -> bytes:
    return sha256(salt.encode()).digest()
