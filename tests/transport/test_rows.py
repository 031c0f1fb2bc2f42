"""Digests of KV rows: equal for equal rows in any blocks, and changed by everything that can go wrong with them."""

from __future__ import annotations

import random
import socket
import threading
from itertools import combinations

import pytest
import torch

from sageLLM.runtime.transport.rows import NativeCopier, RowCopier, Rows, Span, TorchCopier

BLOCK_SIZE, HEADS, WIDTH = 4, 3, 16
TOKENS = 3 * BLOCK_SIZE


def rows_in(blocks: list[int], values: torch.Tensor) -> Rows:
    """Tokens 2 .. of these blocks of a pool; the values are those of heads 1 and 2."""
    cache = torch.rand(9, BLOCK_SIZE, HEADS, WIDTH)
    rows = Rows(cache, Span(2, len(values), blocks, BLOCK_SIZE), slice(1, 3))
    done = 0
    for part in rows.slices():
        part.copy_(values[done : done + len(part)])
        done += len(part)
    return rows


@pytest.mark.parametrize("kind", [NativeCopier, TorchCopier])
def test_a_digest_is_that_of_the_rows_alone(kind: type[RowCopier]) -> None:
    copier = kind()
    values = torch.rand(TOKENS - 2, 2, WIDTH)
    first, second = rows_in([4, 5, 6], values), rows_in([7, 0, 2], values)
    copy = Rows.packed(first)
    digests = {copier.digest(first, 5), copier.digest(second, 5), copier.copy(second, copy, 5), copier.digest(copy, 5)}
    assert len(digests) == 1
    assert torch.equal(copy.cache[0], values)
    assert copier.digest(first, 6) not in digests


@pytest.mark.parametrize("kind", [NativeCopier, TorchCopier])
@pytest.mark.parametrize("width", [3, 16, 64, 513])  # bytes of a row and a head; 64 makes whole lines
@pytest.mark.parametrize("heads", [slice(0, 3), slice(1, 2)])
@pytest.mark.parametrize("blocks", ["in order", "scattered"])
def test_rows_pass_a_socket(kind: type[RowCopier], width: int, heads: slice, blocks: str) -> None:
    draw, copier = random.Random(width), kind()
    num_tokens = 1000 if width > 3 else 41
    num_blocks = -(-(num_tokens + 5) // 16)
    orders = [list(range(num_blocks)), list(range(num_blocks))]
    if blocks == "scattered":
        draw.shuffle(orders[1])
    caches = [
        [torch.randint(0, 255, (num_blocks, 16, 3, size), dtype=torch.uint8) for size in (width, 2 * width)]
        for _ in orders
    ]
    ends = [
        [Rows(cache, Span(5, num_tokens, order, 16), heads) for cache in own]
        for own, order in zip(caches, orders, strict=True)
    ]
    before = [cache.clone() for cache in caches[1]]
    wanted = 7
    for rows in ends[0]:
        wanted = copier.digest(rows, wanted)
    sender, receiver = socket.socketpair()
    sent: list[int] = []
    with sender, receiver:
        thread = threading.Thread(target=lambda: sent.append(copier.send(sender, ends[0], 7)))
        thread.start()
        assert copier.receive(receiver, ends[1], 7) == wanted
        thread.join()
    assert sent == [wanted]
    for source, target, old in zip(*ends, before, strict=True):
        assert torch.equal(torch.cat(source.slices()), torch.cat(target.slices()))
        for part, was in zip(target.slices(), Rows(old, target.span, heads).slices(), strict=True):
            was.copy_(part)
        assert torch.equal(target.cache, old), "other tokens or heads have changed"


@pytest.mark.parametrize("kind", [NativeCopier, TorchCopier])
def test_the_end_of_a_connection_is_an_error(kind: type[RowCopier]) -> None:
    copier, rows = kind(), rows_in([4, 5, 6], torch.rand(TOKENS - 2, 2, WIDTH))
    sender, receiver = socket.socketpair()
    with receiver:
        sender.close()
        with pytest.raises(OSError):
            copier.receive(receiver, [rows], 0)
        with pytest.raises(OSError):
            copier.send(receiver, [rows], 0)


def test_every_bit_and_every_order_counts() -> None:
    copier, num_bytes = NativeCopier(), 41 * 64
    values = torch.tensor(list(random.Random(2).randbytes(num_bytes)), dtype=torch.uint8)
    cache = values.view(1, 41, 1, 64)
    rows = Rows(cache, Span(0, 41, [0], 41), slice(0, 1))
    found = {copier.digest(rows, 0)}
    for byte in range(0, num_bytes, 3):
        for bit in (0, 7):
            cache.view(-1)[byte] ^= 1 << bit
            found.add(copier.digest(rows, 0))
            cache.view(-1)[byte] ^= 1 << bit
    assert len(found) == 1 + 2 * len(range(0, num_bytes, 3))
    swapped = set()
    for a, b in combinations(range(41), 2):
        cache[0, [a, b]] = cache[0, [b, a]]
        swapped.add(copier.digest(rows, 0))
        cache[0, [a, b]] = cache[0, [b, a]]
    assert len(swapped) == 41 * 40 // 2 and not swapped & found
