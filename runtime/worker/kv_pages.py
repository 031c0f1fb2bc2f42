"""Allocates the pages of a KV pool in the background, before the kernels write to them.

The memory of a pool is mapped, and the system allocates a page when it is first written to. A decode step in which
several sequences begin a block would wait for a page fault in every layer, and take twice as long. Blocks that were
never used are handed out in ascending order, so it is known which ones are next.
"""

import ctypes
import mmap
import sys
import threading

import torch

from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.order_thread import OrderThread

MARGIN_BYTES = 16 * 2**20
"""Memory that is allocated beyond the blocks in use; it is more if all sequences could need a block at once."""
PAUSE_SECONDS = 0.004
"""Time between two layers: the thread takes a core from the kernels of a step, so its work is spread over many."""
MADV_POPULATE_WRITE = 23  # of <sys/mman.h>; Linux 5.14. Contents do not change.


class KVPages:
    """The pages of one pool on the CPU. On systems that cannot allocate pages in advance, nothing is done."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        tensors = pool.keys if pool.shape.is_shared else [*pool.keys, *pool.values]
        self._tensors = tensors if sys.platform == "linux" and pool.device.type == "cpu" else []
        self._margin = -(-MARGIN_BYTES * pool.num_blocks // max(pool.num_bytes, 1))
        self._num_requested = 0
        self._is_closing = threading.Event()
        self._thread = OrderThread[range, None]("sagellm-kv-pages") if self._tensors else None

    def expect(self, num_used: int, num_sequences: int) -> None:
        """The blocks below `num_used` are in use, by about `num_sequences` sequences; allocates those that follow."""
        wanted = min(num_used + max(self._margin, 2 * num_sequences), self._pool.num_device_blocks)
        # In steps of a quarter of the margin, as the thread should not wake up for every block.
        least = self._num_requested + self._margin // 4 + 1
        if self._thread is None or wanted < min(least, self._pool.num_device_blocks):
            return
        if wanted > self._num_requested:
            self._thread.submit(self._populate, range(max(self._num_requested, num_used), wanted))
            self._num_requested = wanted

    def close(self) -> None:
        """Ends the thread, which first allocates what it was told to, without pauses."""
        self._is_closing.set()
        if self._thread is not None:
            self._thread.close()

    def _populate(self, blocks: range) -> None:
        for tensor in self._tensors:
            if not populate(tensor[blocks.start : blocks.stop]):
                self._tensors = []
                return
            self._is_closing.wait(PAUSE_SECONDS)


def populate(tensor: torch.Tensor) -> bool:
    """Allocates the pages that the contiguous tensor fills, and the one it begins in; false if the system cannot."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return num_bytes == 0 or advise(start, num_bytes, MADV_POPULATE_WRITE) == 0
