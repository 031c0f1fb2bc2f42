"""One of the two ranks of `test_cpu_point_to_point.py`: each sends drawn tensors to the other and checks what it gets.

python point_to_point_rank.py MEMORY PAIR_MEMORY RANK
"""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import KernelError, Library
from sageLLM.runtime.kernels.cpu.point_to_point import (
    RING_BYTES,
    Link,
    attach,
    break_link,
    connect,
    is_connected,
    open_links,
)

# The last one is larger than a ring: it passes while the receiver reads.
SHAPES = [(1, 1), (1, 7), (3, 640), (129, 33), (5, 2, 16), (0, 8), (3, RING_BYTES // 8 + 5)]
ROUNDS = 5
PAIR_BYTES = 2**17


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def main() -> None:
    memory, pair, rank = (int(text) for text in sys.argv[1:])
    compiler = find_compiler()
    assert compiler is not None, "the test is skipped without a compiler"
    library = Library(cpu.KERNELS, Path(cpu.__file__).parent, compiler)
    send, recv = (NativeCallable(cpu.KERNELS[name], library, reference.KERNELS[name]) for name in ("send", "recv"))
    with pytest.raises(KernelError, match="no link to rank 0 of the group"):
        send(torch.zeros(1, 1), peer=0, group="af")
    open_links(memory, 2, compiler)
    connect("af", [1, 0], own=rank)  # numbered in the other order: the peer has the number of this rank
    connect("pp", [0, 1], own=rank)
    assert is_connected("pp", 1 - rank) and not is_connected("pp", 2)
    for number in range(ROUNDS):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in SHAPES:
                for group, peer in (("pp", 1 - rank), ("af", rank)):
                    own, expected = (drawn(shape, dtype, 2 * number + one) for one in (rank, 1 - rank))
                    wide = torch.cat([own, own], -1)[..., : shape[-1]]  # rows with gaps
                    buffer = torch.empty(shape, dtype=dtype)
                    if rank == 0:
                        assert torch.equal(send(own, peer=peer, group=group), own)
                    found = recv(buffer, peer=peer, group=group)
                    assert found is buffer and torch.equal(found, expected), f"{shape} {dtype}"
                    if rank == 1:
                        assert torch.equal(send(wide, peer=peer, group=group), own)
    exchange_arrays(Link("pp", 1 - rank), rank)
    attach("af", rank, pair, rank, PAIR_BYTES, compiler)  # in place of the connection to the same peer
    exchange_arrays(Link("af", rank), rank)
    if rank == 0:
        break_a_link(Link("af", rank), rank)
    check_sizes(send, recv, rank)


def exchange_arrays(link: Link, rank: int) -> None:
    """Many messages in flight, in order."""
    numbers = np.arange(1000)
    for number in numbers:
        link.send(np.full(number % 7, number + rank))
    for number in numbers:
        found = np.empty(number % 7, np.int64)
        link.receive(found)
        assert (found == number + 1 - rank).all()


def break_a_link(link: Link, peer: int) -> None:
    """The other rank sends nothing and reads nothing; a wait ends when another thread breaks the link."""
    for wait in (lambda: link.receive(np.empty(1)), lambda: link.send(np.empty(PAIR_BYTES))):
        timer = threading.Timer(0.05, break_link, ("af", peer))
        timer.start()
        with pytest.raises(OSError, match=r"the link to rank .* is broken"):
            wait()
        timer.join()


def check_sizes(send: NativeCallable, recv: NativeCallable, rank: int) -> None:
    send(torch.zeros(2, 3), peer=1 - rank, group="pp")
    with pytest.raises(KernelError, match=f"the message of rank {1 - rank} has an unexpected size"):
        recv(torch.zeros(2, 4), peer=1 - rank, group="pp")


if __name__ == "__main__":
    main()
