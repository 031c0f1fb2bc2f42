"""Digests of KV rows: equal for equal rows in any blocks, and changed by everything that can go wrong with them."""

from __future__ import annotations

import random
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
