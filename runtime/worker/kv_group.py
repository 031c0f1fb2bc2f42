"""Group of prefill and decode workers that copy KV to each other, and the port of each rank in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import msgspec
import torch

from sageLLM.runtime.transport.base import Place, Report
from sageLLM.runtime.transport.handle import PieceKey, SignedHandle
from sageLLM.runtime.transport.memory import MemoryTransport
from sageLLM.runtime.transport.nixl import NixlTransport
from sageLLM.runtime.transport.rows import DigestName
from sageLLM.runtime.transport.shards import Part, PoolShape, PoolShard, map_pool, part_of
from sageLLM.runtime.transport.tcp import TcpTransport
from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.step_gate import StepCounter

TransportName = Literal["shared_memory", "tcp", "nixl"]


class MemberSpec(msgspec.Struct, frozen=True):
    """A worker of the group: its ranks, its pool, and over shared memory the descriptors of the pools of its ranks."""

    tp: int
    num_blocks: int
    block_size: int
    memory: list[int] = []


class KVGroup(msgspec.Struct, frozen=True):
    """The group as one of its ranks sees it: the number of its worker, its epoch, and all members.

    `key` authenticates connections and signs handles, and `digest` is that of all copies. The model has KV of
    `num_heads` heads in `num_layers` layers.
    """

    worker: int
    epoch: int
    transport: TransportName
    key: bytes
    num_layers: int
    num_heads: int
    widths: tuple[int, int | None]
    members: list[MemberSpec]
    digest: DigestName

    @property
    def files(self) -> list[int]:
        """The descriptors that a process of the group inherits."""
        return [file for member in self.members for file in member.memory]

    def with_files(self, files: Iterator[int]) -> KVGroup:
        """The group with other numbers of its descriptors, in the order of `files`."""
        members = [msgspec.structs.replace(one, memory=[next(files) for _ in one.memory]) for one in self.members]
        return msgspec.structs.replace(self, members=members)

    def parts(self) -> list[list[Part]]:
        """The part of each rank of each worker."""
        return [
            [part_of(rank, one.tp, self.num_layers, self.num_heads) for rank in range(one.tp)] for one in self.members
        ]

    def shape(self, worker: int, rank: int) -> PoolShape:
        """The shape of the pool of a rank."""
        member, (key_width, value_width) = self.members[worker], self.widths
        heads = len(part_of(rank, member.tp, self.num_layers, self.num_heads).heads)
        values = None if value_width is None else (heads, value_width)
        return PoolShape(self.num_layers, member.num_blocks, member.block_size, (heads, key_width), values)

    def open_pool(self, dtype: torch.dtype, worker: int, rank: int) -> PoolShard:
        """The pool of a rank of another worker, in memory that this process maps."""
        shape = self.shape(worker, rank)
        part = self.parts()[worker][rank]
        return PoolShard(part, shape.block_size, *map_pool(self.members[worker].memory[rank], shape, dtype))

    def pool_without_memory(self, dtype: torch.dtype, worker: int, rank: int) -> PoolShard:
        """The pool of a rank of another worker on the device "meta", which has sizes and strides alone."""
        shape = self.shape(worker, rank)
        caches = [torch.empty(sizes, dtype=dtype, device="meta") for sizes in shape.sizes()]
        keys, values = caches[: shape.num_layers], caches[shape.num_layers :]
        return PoolShard(self.parts()[worker][rank], shape.block_size, keys, values)


class PushKV(msgspec.Struct, tag="push_kv", frozen=True):
    """Command to all ranks of the source: copy their parts of a piece to the target's ranks at these addresses.

    With `step` each layer is copied when the worker's order of this number, from 1, has computed it.
    """

    handle: SignedHandle
    addresses: list[str] = []
    step: int = 0


class CheckKV(msgspec.Struct, tag="check_kv", frozen=True):
    """Command to all ranks of the target: compare a piece with the digests for each rank."""

    handle: SignedHandle
    digests: list[list[int]]


class CancelKV(msgspec.Struct, tag="cancel_kv", frozen=True):
    """Command to all ranks of a worker: stop a piece."""

    key: PieceKey


KVCommand = PushKV | CheckKV | CancelKV


def make_transport(group: KVGroup, place: Place, dtype: torch.dtype) -> MemoryTransport | TcpTransport | NixlTransport:
    """The transport of a rank. Raises SageError if it cannot be used."""
    if group.transport == "tcp":
        return TcpTransport(place)
    if group.transport == "nixl":
        return NixlTransport(place, partial(group.pool_without_memory, dtype))
    return MemoryTransport(place, partial(group.open_pool, dtype))


class KVPort:
    """A rank's transport. `send` gets its reports, in a thread of the port."""

    def __init__(
        self, group: KVGroup, rank: int, pool: KVPool, send: Callable[[Report], None], steps: StepCounter
    ) -> None:
        """Raises SageError if the transport cannot be used."""
        self._rank, self._steps = rank, steps
        place = Place(group.worker, rank, group.epoch, group.parts(), group.key, group.digest)
        self._transport = make_transport(group, place, pool.keys[0].dtype)
        values = () if pool.shape.is_shared else pool.values
        self._transport.register(PoolShard(place.parts[group.worker][rank], pool.block_size, pool.keys, values))
        self.address = "" if isinstance(self._transport, MemoryTransport) else self._transport.address
        threading.Thread(target=self._report, args=(send,), name="sagellm-kv-reports", daemon=True).start()

    def handle(self, command: KVCommand) -> None:
        """Starts what the command says."""
        if isinstance(command, PushKV):
            gate = self._steps.gate(command.step) if command.step else None
            self._transport.push(command.handle, command.addresses, gate)
        elif isinstance(command, CheckKV):
            self._transport.check(command.handle, command.digests[self._rank])
        else:
            self._transport.cancel(command.key)

    def _report(self, send: Callable[[Report], None]) -> None:
        while reports := self._transport.poll(None):
            for report in reports:
                send(report)
