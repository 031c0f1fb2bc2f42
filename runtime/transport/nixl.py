"""Transport over NVIDIA NIXL (extra `nixl`): one-sided writes by UCX, over shared memory, TCP or RDMA.

The address of a rank is the metadata of its NIXL agent with the places of its pool. Connections are those of UCX, which
do not prove that they have the engine's key; without UCX_NET_DEVICES they are limited to the loopback interface.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.transport.base import LayerGroups, Place, QueuedTransport
from sageLLM.runtime.transport.handle import Handle, SignedHandle
from sageLLM.runtime.transport.rows import Rows
from sageLLM.runtime.transport.shards import PoolShard, Route

POLL_SECONDS = 50e-6
Region = tuple[int, int]
"""The address and the length in bytes of contiguous memory."""


class Address(msgspec.Struct, frozen=True, array_like=True):
    """The metadata of an agent, and the addresses of its caches: all keys, then all values."""

    metadata: bytes
    caches: list[int]


class Target(NamedTuple):
    """A rank that this one writes to: the name of its agent, its pool without memory, and its caches' addresses."""

    agent: str
    pool: PoolShard
    caches: list[int]


class NixlTransport(QueuedTransport):
    """Writes to the pools of other ranks; `shape_of` returns the pool of a rank of a worker, on the device "meta"."""

    def __init__(self, place: Place, shape_of: Callable[[int, int], PoolShard]) -> None:
        """Raises SageError without the package."""
        self._shape_of = shape_of
        self._targets: dict[str, Target] = {}
        self._agent: Any = _make_agent(f"sagellm-{place.worker}-{place.rank}-{place.epoch}")
        super().__init__(place)

    def register(self, pool: PoolShard) -> None:
        super().register(pool)
        self._agent.register_memory([*pool.keys, *pool.values])

    def close(self) -> None:
        super().close()
        self._agent = None  # its threads end

    @property
    def address(self) -> str:
        """The address of this rank, after `register`."""
        caches = [cache.data_ptr() for cache in (*self.pool.keys, *self.pool.values)]
        encoded = msgspec.msgpack.encode(Address(self._agent.get_agent_metadata(), caches))
        return base64.b64encode(encoded).decode()

    def _send(self, handle: Handle, signed: SignedHandle, route: Route, address: str, layers: LayerGroups) -> int:
        target = self._target(address, handle.target.worker, route.target)
        source_span = self.pool.span(handle.start, handle.num_tokens, handle.source.blocks)
        target_span = target.pool.span(handle.start, handle.num_tokens, handle.target.blocks)
        digest = 0
        for layer in chain.from_iterable(layers):
            own = self.pool.rows(layer, source_span, route.heads)
            other = target.pool.rows(layer, target_span, route.heads)
            bases = self._cache_addresses(target, layer)
            pairs = [pair for a, b, base in zip(own, other, bases, strict=True) for pair in paired(a, b, base)]
            writing = self._begin(target.agent, pairs)
            for rows in own:
                digest = self.copier.digest(rows, digest)
            self._finish(writing)
        return digest

    @staticmethod
    def _cache_addresses(target: Target, layer: int) -> list[int]:
        index, num_layers = layer - target.pool.part.layers.start, len(target.pool.keys)
        return [target.caches[first + index] for first in range(0, len(target.caches), num_layers)]

    def _target(self, address: str, worker: int, rank: int) -> Target:
        if address not in self._targets:
            decoded = msgspec.msgpack.decode(base64.b64decode(address), type=Address)
            agent = self._agent.add_remote_agent(decoded.metadata)
            name = agent.decode() if isinstance(agent, bytes) else str(agent)
            self._targets[address] = Target(name, self._shape_of(worker, rank), decoded.caches)
        return self._targets[address]

    def _begin(self, agent: str, pairs: Sequence[tuple[Region, Region]]) -> Any:
        own, other = ([(*pair[side], 0) for pair in pairs] for side in (0, 1))
        local, remote = (self._agent.get_xfer_descs(regions, "DRAM") for regions in (own, other))
        writing = self._agent.initialize_xfer("WRITE", local, remote, agent, b"")
        if self._agent.transfer(writing) == "ERR":
            raise OSError("NIXL cannot start a write")
        return writing

    def _finish(self, writing: Any) -> None:
        """Waits without a limit: the engine kills a worker that does not stop a cancelled piece."""
        while (state := self._agent.check_xfer_state(writing)) == "PROC":
            time.sleep(POLL_SECONDS)
        self._agent.release_xfer_handle(writing)
        if state != "DONE":
            raise OSError("NIXL has lost the connection to the target")


def paired(own: Rows, other: Rows, base: int) -> Iterator[tuple[Region, Region]]:
    """The regions of the same rows in both caches; `base` is the address of the other one."""
    first, second = iter(own.regions()), iter(other.regions())
    (a, left_a), (b, left_b) = next(first), next(second)
    start = own.cache.data_ptr()
    while True:
        size = min(left_a, left_b)
        yield (start + a, size), (base + b, size)
        a, left_a, b, left_b = a + size, left_a - size, b + size, left_b - size
        if not left_a:
            a, left_a = next(first, (0, 0))
        if not left_b:
            b, left_b = next(second, (0, 0))
        if not (left_a and left_b):
            return


def has_nixl() -> bool:
    """Whether the package is installed."""
    return find_spec("nixl") is not None


def _make_agent(name: str) -> Any:
    if not has_nixl():
        raise SageError("kv_transport='nixl' requires the package nixl; install sageLLM[nixl]")
    os.environ.setdefault("UCX_NET_DEVICES", "lo")  # before UCX is loaded
    os.environ.setdefault("UCX_TLS", "shm,self,tcp")
    api = import_module("nixl._api")
    return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
