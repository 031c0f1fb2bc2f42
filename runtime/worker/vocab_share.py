"""The share of the vocabulary of a rank, and its exchange with the other ranks of the pipeline stage."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sageLLM.generated.kernels.reference.process_groups import process_group
from sageLLM.runtime.core.model.weights import vocab_share
from sageLLM.runtime.execution_graph.local_sampling import share_of
from sageLLM.runtime.kernels.cpu.communicator import gather_bytes, has_communicator
from sageLLM.runtime.sampling.share import Share


def share_of_rank(config: Any) -> Share:
    """The tokens with logits on the rank that the config of a model belongs to."""
    first, count = share_of(config.rank, vocab_share(config.V, config.tp), config.V)
    return Share(first, count, config.V, config.tp, _gather)


def _gather(x: Tensor) -> Tensor:
    """The x u8[...] of all ranks, u8[ranks, ...], through memory that they share, or by torch.distributed."""
    if x.device.type == "cpu" and has_communicator():
        return gather_bytes(x)
    group = process_group("tp")
    if group is None:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)
