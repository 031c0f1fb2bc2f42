"""Transports over memory: between pools of one process, and between processes that map each other's pools.

Copies are one-sided: the source writes to the blocks that the target has reserved, and the target computes meanwhile.
So the engine must not reuse the target's blocks before the source has reported the end of the piece, or has died.
"""

from collections.abc import Callable

from sageLLM.runtime.transport.base import LayerRows, Place, QueuedTransport
from sageLLM.runtime.transport.handle import Handle, SignedHandle
from sageLLM.runtime.transport.shards import PoolShard, Route, Span


class MemoryTransport(QueuedTransport):
    """Writes to the pools of the other workers; `open_pool` returns that of a rank of a worker, once each.

    In one process these are the pools themselves, and between processes mappings of their memory.
    """

    def __init__(self, place: Place, open_pool: Callable[[int, int], PoolShard]) -> None:
        self._open_pool = open_pool
        self._targets: dict[tuple[int, int], PoolShard] = {}
        super().__init__(place)

    def _send(self, handle: Handle, signed: SignedHandle, route: Route, address: str, rows: LayerRows) -> None:
        key = handle.target.worker, route.target
        target = self._targets.get(key)
        if target is None:
            target = self._targets[key] = self._open_pool(*key)
        span = Span(handle.start, handle.num_tokens, handle.target.blocks)
        for layer in rows.layers:
            for cache, one in zip(target.caches(layer), rows.of(layer), strict=True):
                target.write(cache, span, route.heads, one)
