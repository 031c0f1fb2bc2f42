"""Sizes of a model's KV cache: bytes per block, blocks of the pool, blocks of the swap tiers."""

import math

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig

KV_CACHE_BYTES = 2**30
"""The default size of a KV pool; it is made smaller if the scheduler can never use that much."""


def default_num_blocks(model: Model, config: PDSchedulerConfig, block_size: int) -> int:
    """The number of blocks that fit in KV_CACHE_BYTES, at most what a full batch of the longest sequences uses.

    At least one sequence of the full model length always fits.
    """
    # Never less than one sequence of full length: otherwise a request that the model accepts could never be scheduled.
    longest = -(-model.max_model_len // block_size)
    affordable: int = KV_CACHE_BYTES // bytes_per_block(model, block_size)
    return max(longest, min(affordable, longest * config.max_decode_batch_size))


def bytes_per_block(model: Model, block_size: int) -> int:
    """The bytes of the KV of `block_size` tokens, over all layers."""
    c = model.config
    num_bytes: int = c.L * block_size * model.layout.cache(c).num_elements * model.dtype.itemsize
    return num_bytes


def num_tier_blocks(model: Model, name: str, gib: float, block_size: int) -> int:
    """The number of blocks that fit in a tier of `gib` GiB; 0 GiB means no tier. SageError names the option `name`."""
    if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 <= gib < math.inf:
        raise SageError(f"{name} must be a number of GiB, at least 0, got {shown(gib)}")
    block_bytes = bytes_per_block(model, block_size)
    num_blocks = int(gib * 2**30) // block_bytes
    if gib and not num_blocks:
        raise SageError(
            f"{name} must hold at least one KV block of {block_bytes} bytes, got {gib} GiB; raise it, or pass 0"
        )
    return num_blocks
