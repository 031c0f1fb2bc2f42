"""Rows of KV in a paged pool, and copies of them with a digest, also to and from a socket."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterator, Sequence
from ctypes import byref, c_uint64
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sageLLM.runtime.kernels.cpu.compiler import CompileError, find_compiler
from sageLLM.runtime.kernels.cpu.kv_rows import NativeRows, load_row_functions
from sageLLM.runtime.transport.sockets import receive_into, send_parts

DigestName = Literal["lanes", "crc32"]
"""The digest of the C++ kernel, and that of machines without a compiler; both ends of a copy must have the same."""


class Span:
    """Tokens `start .. start + num_tokens - 1` of a sequence, in `blocks`; the first block holds token `start`."""

    __slots__ = ("block_size", "first", "index", "num_tokens", "runs")

    def __init__(self, start: int, num_tokens: int, blocks: Sequence[int], block_size: int) -> None:
        """`runs` are the first slots and the lengths of tokens that follow each other in memory."""
        self.num_tokens, self.block_size = num_tokens, block_size
        self.first = start % block_size
        self.index = torch.tensor(blocks, dtype=torch.int64)
        self.runs = self._runs(blocks)

    def _runs(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        cuts = [0, *(i for i, (a, b) in enumerate(pairwise(blocks), 1) if b != a + 1), len(blocks)]
        runs, left, skipped = [], self.num_tokens, self.first
        for begin, end in pairwise(cuts):
            length = min(left, (end - begin) * self.block_size - skipped)
            if length > 0:
                runs.append((blocks[begin] * self.block_size + skipped, length))
            left, skipped = left - length, 0
        return runs


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a span in a cache [blocks, block_size, heads, width], of some of its heads."""

    cache: Tensor
    span: Span
    heads: slice

    @staticmethod
    def packed(like: Rows) -> Rows:
        """New memory for the same tokens and heads, without gaps."""
        num_tokens, num_heads = like.span.num_tokens, like.num_heads
        cache = torch.empty((1, num_tokens, num_heads, like.cache.shape[3]), dtype=like.cache.dtype)
        return Rows(cache, Span(0, num_tokens, [0], num_tokens), slice(0, num_heads))

    @property
    def num_heads(self) -> int:
        return int(self.heads.stop - self.heads.start)

    @property
    def row_bytes(self) -> int:
        return self.num_heads * self.cache.shape[3] * self.cache.itemsize

    @property
    def num_bytes(self) -> int:
        return self.span.num_tokens * self.row_bytes

    @property
    def has_gaps(self) -> bool:
        """Whether other heads are between the rows."""
        return self.num_heads < self.cache.shape[2]

    def regions(self) -> Iterator[tuple[int, int]]:
        """Contiguous memory in the order of the tokens: the offset in the cache, and the length, in bytes."""
        token_bytes, size = self.cache.stride(1) * self.cache.itemsize, self.row_bytes
        skipped = self.heads.start * self.cache.stride(2) * self.cache.itemsize
        for first, length in self.span.runs:
            if self.has_gaps:
                yield from ((token * token_bytes + skipped, size) for token in range(first, first + length))
            else:
                yield first * token_bytes, length * size

    def parts(self) -> list[memoryview]:
        """The memory of all regions."""
        array: Any = self.cache.view(torch.uint8).numpy()
        memory = memoryview(array).cast("B")
        return [memory[start : start + length] for start, length in self.regions()]

    def native(self) -> NativeRows:
        """The rows for the C++ kernel; valid as long as the cache and the span."""
        block_stride, row_stride, head_stride, _ = self.cache.stride()
        size = self.cache.itemsize
        base = self.cache.data_ptr() + self.heads.start * head_stride * size
        index = self.span.index
        place = self.span.block_size, self.span.first, index.data_ptr(), len(index)
        return NativeRows(base, block_stride * size, row_stride * size, self.row_bytes, *place)

    def slices(self) -> list[Tensor]:
        """The tokens of each run, [tokens, heads, width]."""
        rows = self.cache.flatten(0, 1)
        return [rows[first : first + length, self.heads] for first, length in self.span.runs]


class RowCopier(Protocol):
    """Copies rows and computes their digests, which continue the digest of earlier rows.

    `send` and `receive` pass the rows of caches with the same tokens through a socket. They raise OSError, also when
    the other end has closed the connection.
    """

    def copy(self, source: Rows, target: Rows, digest: int) -> int: ...
    def digest(self, rows: Rows, digest: int) -> int: ...
    def send(self, stream: socket.socket, rows: Sequence[Rows], digest: int) -> int: ...
    def receive(self, stream: socket.socket, rows: Sequence[Rows], digest: int) -> int: ...


class NativeCopier:
    """One pass over the memory for both; other threads run meanwhile."""

    def __init__(self) -> None:
        """Raises CompileError."""
        self._functions = load_row_functions(find_compiler())

    def copy(self, source: Rows, target: Rows, digest: int) -> int:
        num_tokens = source.span.num_tokens
        return int(self._functions.copy(byref(source.native()), byref(target.native()), num_tokens, digest))

    def digest(self, rows: Rows, digest: int) -> int:
        return int(self._functions.copy(byref(rows.native()), None, rows.span.num_tokens, digest))

    def send(self, stream: socket.socket, rows: Sequence[Rows], digest: int) -> int:
        return self._pass(self._functions.send, stream, rows, digest)

    def receive(self, stream: socket.socket, rows: Sequence[Rows], digest: int) -> int:
        return self._pass(self._functions.receive, stream, rows, digest)

    @staticmethod
    def _pass(function: Any, stream: socket.socket, rows: Sequence[Rows], digest: int) -> int:
        found, native = c_uint64(digest), [one.native() for one in rows]
        array = (NativeRows * len(native))(*native)
        if error := function(stream.fileno(), array, len(native), rows[0].span.num_tokens, byref(found)):
            raise OSError(error, os.strerror(error))
        return found.value


class TorchCopier:
    """For machines without a C++ compiler: copies by torch, and CRC-32."""

    def copy(self, source: Rows, target: Rows, digest: int) -> int:
        found, copied = torch.cat(source.slices()), 0
        for rows in target.slices():
            rows.copy_(found[copied : copied + len(rows)])
            copied += len(rows)
        return _crc32(found, digest)

    def digest(self, rows: Rows, digest: int) -> int:
        return _crc32(torch.cat(rows.slices()), digest)

    def send(self, stream: socket.socket, rows: Sequence[Rows], digest: int) -> int:
        for one in rows:
            packed = Rows.packed(one)
            digest = self.copy(one, packed, digest)
            send_parts(stream, packed.parts())
        return digest

    def receive(self, stream: socket.socket, rows: Sequence[Rows], digest: int) -> int:
        for one in rows:
            packed = Rows.packed(one)
            receive_into(stream, *packed.parts())
            digest = self.copy(packed, one, digest)
        return digest


def _crc32(rows: Tensor, digest: int) -> int:
    array: Any = rows.contiguous().view(torch.uint8).numpy()
    return zlib.crc32(memoryview(array).cast("B"), digest)


def make_copier(name: DigestName) -> RowCopier:
    """The copier with this digest. Raises CompileError."""
    return NativeCopier() if name == "lanes" else TorchCopier()


def best_digest() -> DigestName:
    """The digest for the machine of this process."""
    try:
        NativeCopier()
    except CompileError:
        return "crc32"
    return "lanes"
