"""Connects a worker process to the other ranks: process groups of torch.distributed, and memory shared on one host.

The groups are `tp`, the ranks of a pipeline stage, and `pp`, one rank of each stage.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from sageLLM.generated.kernels.reference.process_groups import set_process_group
from sageLLM.runtime.kernels.cpu.communicator import close_communicator, open_communicator
from sageLLM.runtime.kernels.cpu.compiler import CompileError, find_compiler
from sageLLM.runtime.kernels.cpu.point_to_point import close_links, connect, is_connected, open_links
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.token_return import SharedMemoryTokens, TokenChannel, TokenReturn, TorchTokens

RENDEZVOUS_SECONDS = 120.0


def join_ranks(spec: WorkerSpec) -> TokenReturn | None:
    """Meets the other ranks. Returns the way of sampled tokens between pipeline stages, if there are several."""
    if spec.num_ranks == 1:
        return None
    is_cuda = spec.device.startswith("cuda")
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=_store(spec),
        rank=spec.rank,
        world_size=spec.num_ranks,
        timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
    )
    tokens = _make_groups(spec)
    if is_cuda:
        torch.cuda.set_device(spec.rank)
    else:
        _share_memory(spec)
    if spec.pp == 1:
        return None
    return TokenReturn(_token_channel(spec, tokens), is_first_stage=spec.is_first_stage)


def _store(spec: WorkerSpec) -> Store:
    if spec.rendezvous_file is not None:
        return FileStore(f"/proc/self/fd/{spec.rendezvous_file}", spec.num_ranks)
    assert spec.rendezvous is not None, "ranks need a file or an address to find each other"
    address, colon, port = spec.rendezvous.rpartition(":")
    if not colon:
        return FileStore(spec.rendezvous, spec.num_ranks)
    return TCPStore(address, int(port), spec.num_ranks, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))


def _make_groups(spec: WorkerSpec) -> "dist.ProcessGroup | None":
    """Makes the groups, in the same order on all ranks. Returns the group for sampled tokens of this rank."""
    if spec.pp == 1:
        return None  # the default group is that of the only stage
    tokens = None
    for stage in range(spec.pp):
        ranks = spec.ranks_of_stage(stage)
        group = dist.new_group(ranks)
        if spec.rank in ranks:
            set_process_group("tp", group)
    for first in range(spec.tp):
        ranks = list(range(first, spec.num_ranks, spec.tp))
        group, on_host = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")
        if spec.rank in ranks:
            set_process_group("pp", group)
            tokens = on_host
    return tokens


def _share_memory(spec: WorkerSpec) -> None:
    """Opens the collectives and links of the CPU kernels, if all ranks can: all must use the same ones."""
    if spec.kernels == "reference":
        return
    can_open = False
    try:
        compiler = find_compiler()
        if spec.shared_memory is not None:
            open_communicator(spec.shared_memory, spec.rank % spec.tp, spec.tp, compiler)
        if spec.link_memory is not None:
            open_links(spec.link_memory, spec.num_ranks, compiler)
            connect("pp", [rank if rank in spec.host_ranks else None for rank in spec.stage_peers], spec.rank)
        can_open = True
    except (CompileError, OSError) as error:
        LOG.warning("rank %d uses torch.distributed between ranks: %s", spec.rank, error)
    can_all = torch.tensor([int(can_open)])
    dist.all_reduce(can_all, dist.ReduceOp.MIN)
    if not can_all.item():
        close_communicator()
        close_links()


def _token_channel(spec: WorkerSpec, group: "dist.ProcessGroup | None") -> TokenChannel | None:
    if not (spec.is_first_stage or spec.is_last_stage):
        return None
    peer = spec.pp - 1 if spec.is_first_stage else 0
    if is_connected("pp", peer):
        return SharedMemoryTokens(peer)
    assert group is not None, "stages have a group"
    return TorchTokens(group, peer)
