"""Hash chain over full blocks of tokens: equal prefixes have equal block names.

    name(i) = SHA-256(name(i - 1), tokens of block i),   name(-1) = SHA-256(salt)

Equal names therefore mean equal tokens from the start of the sequence and an equal salt. A salt (a tenant, an adapter)
separates sequences that must not share KV. The hash is cryptographic because a collision, which a user could
construct for a weak hash, would serve one user's KV to another.
"""

import struct
from collections.abc import Sequence
from hashlib import sha256


class HashChain:
    """The names of one sequence's full blocks, each computed on first use.

    The token lists are live: outputs may grow at the end, and nothing else may change.
    """

    __slots__ = ("_block_size", "_names", "_outputs", "_pack", "_prompt", "_root")

    def __init__(self, block_size: int, prompt: Sequence[int], outputs: Sequence[int], salt: str = "") -> None:
        self._block_size = block_size
        self._prompt = prompt
        self._outputs = outputs
        self._pack = struct.Struct(f"<{block_size}q").pack  # fixed width: [1, 23] and [12, 3] must differ
        self._names: list[bytes] = []
        self._root = sha256(salt.encode()).digest()

    @property
    def root(self) -> bytes:
        """The name before the first block."""
        return self._root

    @property
    def num_prompt_blocks(self) -> int:
        """The blocks with prompt tokens, the last of which may have output tokens too."""
        return -(-len(self._prompt) // self._block_size)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self._prompt) + len(self._outputs)

    def name(self, index: int) -> bytes:
        """The name of block `index`, which must be full."""
        names = self._names
        while len(names) <= index:
            parent = names[-1] if names else self._root
            names.append(sha256(parent + self._pack(*self._tokens_of(len(names)))).digest())
        return names[index]

    def _tokens_of(self, index: int) -> Sequence[int]:
        start, split = index * self._block_size, len(self._prompt)
        end = start + self._block_size
        if end <= split:
            return self._prompt[start:end]
        outputs = self._outputs[max(0, start - split) : end - split]
        return [*self._prompt[start:split], *outputs]
