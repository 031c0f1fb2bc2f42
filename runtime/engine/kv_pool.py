"""The memory of a paged KV cache: per layer, one key and one value tensor of fixed-size blocks (Kwon et al. 2023)."""

from collections.abc import Iterator, Sequence

import torch

from sageLLM.runtime.core.layout import KvShape


class KVPool:
    """Keys and values [PG, BS, heads, width] for each layer: PG blocks of BS tokens.

    Where the layout keeps values as the leading part of keys, they are views of that memory.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        shape: KvShape,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(kept: tuple[int, int]) -> list[torch.Tensor]:
            sizes = (num_blocks, block_size, *kept)
            return [torch.zeros(sizes, dtype=dtype, device=device) for _ in range(num_layers)]

        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shape = shape
        self.keys = zeros(shape.k)
        self.values = [keys[..., : shape.v[1]] for keys in self.keys] if shape.is_shared else zeros(shape.v)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *(() if self.shape.is_shared else self.values)))

    def layers(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Every layer's number, keys and values."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            yield layer, keys, values


def slots_of(block_ids: Sequence[int], start: int, num_tokens: int, block_size: int) -> list[int]:
    """Where tokens start .. start + num_tokens - 1 of a sequence stand in the pool, as block * BS + offset."""
    return [
        block_ids[position // block_size] * block_size + position % block_size
        for position in range(start, start + num_tokens)
    ]
