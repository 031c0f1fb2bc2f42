"""Transports over memory: between pools of one process, and between processes that map each other's pools.

Copies are one-sided: the source writes to the blocks that the target has reserved, and the target computes meanwhile.
So the engine must not reuse the target's blocks before the source has reported the end of the piece, or has died.
"""

from collections.abc import Callable
from itertools import chain

from sageLLM.runtime.transport.base import LayerGroups, Place, QueuedTransport
from sageLLM.runtime.transport.handle import Handle, SignedHandle
from sageLLM.runtime.transport.jobs import BACKGROUND
from sageLLM.runtime.transport.shards import PoolShard, Route


class MemoryTransport(QueuedTransport):
    """Writes to the pools of the other workers; `open_pool` returns that of a rank of a worker, once each.

    In one process these are the pools themselves, and between processes mappings of their memory.
    """

    def __init__(self, place: Place, open_pool: Callable[[int, int], PoolShard], nice: int = BACKGROUND) -> None:
        self._open_pool = open_pool
        self._targets: dict[tuple[int, int], PoolShard] = {}
        super().__init__(place, nice)

    def _send(self, handle: Handle, signed: SignedHandle, route: Route, address: str, layers: LayerGroups) -> int:
        pool, target = self.pool, self._target(handle.target.worker, route.target)
        source_span = pool.span(handle.start, handle.num_tokens, handle.source.blocks)
        target_span = target.span(handle.start, handle.num_tokens, handle.target.blocks)
        digest = 0
        for layer in chain.from_iterable(layers):
            rows = pool.rows(layer, source_span, route.heads), target.rows(layer, target_span, route.heads)
            for source, copy in zip(*rows, strict=True):
                digest = self.copier.copy(source, copy, digest)
        return digest

    def _target(self, worker: int, rank: int) -> PoolShard:
        if (worker, rank) not in self._targets:
            self._targets[worker, rank] = self._open_pool(worker, rank)
        return self._targets[worker, rank]
