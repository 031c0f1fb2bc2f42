"""Sizes of a model's KV cache: bytes per block, blocks of the pool, blocks of the swap tiers."""

import math
from dataclasses import dataclass

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig

KV_CACHE_BYTES = 2**30
"""The default size of the KV cache, over all pools; it is made smaller if the scheduler can never use that much."""


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    """The size of the KV cache: `num_pools` pools of `num_blocks` blocks, and the reason for it.

    On a CPU a pool occupies memory only as its blocks are used for the first time.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    num_pools: int
    reason: str
    exceeds_default: bool = False

    @property
    def num_bytes(self) -> int:
        return self.num_pools * self.num_blocks * self.block_bytes

    def __str__(self) -> str:
        num_tokens = self.num_blocks * self.block_size
        pools = f" in each of {self.num_pools} pools" if self.num_pools > 1 else ""
        size = f"{self.num_blocks} blocks of {self.block_size} tokens ({num_tokens} tokens){pools}"
        return f"KV cache: {size}, {_shown_bytes(self.num_bytes)}; {self.reason}"


def choose_kv_cache_size(
    model: Model,
    config: PDSchedulerConfig,
    block_size: int,
    num_blocks: int | None,
    num_pools: int = 1,
    device_bytes: int | None = None,
) -> KVCacheSize:
    """The size that the user has chosen, or else as many blocks as fit in `device_bytes`, by default KV_CACHE_BYTES.

    The default is at most what a full batch of the longest sequences uses, and at least one sequence of the full model
    length: otherwise a request that the model accepts could never be scheduled. The `num_pools` pools of the workers
    share the default, so that it does not depend on the mode. On a GPU `device_bytes` are a limit: SageError if one
    sequence does not fit.
    """
    block_bytes = bytes_per_block(model, block_size)
    if num_blocks is not None:
        return KVCacheSize(num_blocks, block_size, block_bytes, num_pools, "set by num_kv_blocks")
    longest = -(-model.max_model_len // block_size)
    full_batch = longest * config.max_decode_batch_size
    limit = KV_CACHE_BYTES if device_bytes is None else device_bytes
    affordable: int = limit // num_pools // block_bytes
    default = f"the default size of {_shown_bytes(limit)}"
    change = "num_kv_blocks changes it"
    if device_bytes is not None:
        default, change = f"{_shown_bytes(limit)} of the GPU", "gpu_memory_utilization changes it"
    sequence = f"of max_model_len={model.max_model_len} tokens"
    if affordable < longest and device_bytes is not None:
        needed, fits = _shown_bytes(longest * block_bytes * num_pools), affordable * block_size
        raise SageError(
            f"one sequence {sequence} must fit in the KV cache, got {default} for {needed}; "
            f"lower max_model_len to at most {fits}, or raise gpu_memory_utilization"
        )
    if affordable < longest:
        reason = f"room for one sequence {sequence}, which takes more than {default}; lower max_model_len for less"
        return KVCacheSize(longest, block_size, block_bytes, num_pools, reason, exceeds_default=True)
    if affordable < full_batch:
        return KVCacheSize(affordable, block_size, block_bytes, num_pools, f"{default}; {change}")
    reason = f"room for max_decode_batch_size={config.max_decode_batch_size} sequences {sequence}"
    return KVCacheSize(full_batch, block_size, block_bytes, num_pools, reason)


def _shown_bytes(num_bytes: int) -> str:
    """A size in GiB, or in MiB if it is less than one GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def bytes_per_block(model: Model, block_size: int) -> int:
    """The bytes of the KV of `block_size` tokens, over all layers, with the scales of codes."""
    c = model.config
    num_bytes: int = c.L * block_size * model.kv_entry.num_elements * model.kv_dtype.itemsize
    return num_bytes


def num_lower_blocks(model: Model, tier: str, gib: float, block_size: int) -> int:
    """The blocks of running requests in the tier below the device; none if `tier` is "device".

    Raises SageError for an unknown tier, and a size of less than a block.
    """
    if tier not in ("device", "host", "disk"):
        raise SageError(f"kv_tier must be 'device', 'host' or 'disk', got {shown(tier)}")
    if tier == "device":
        return 0
    num_blocks = num_tier_blocks(model, "kv_tier_space", gib, block_size)
    if not num_blocks:
        raise SageError(f"kv_tier_space must be more than 0 GiB with kv_tier={tier!r}")
    return num_blocks


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
