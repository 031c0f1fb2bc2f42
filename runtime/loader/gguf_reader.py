"""Reads the header of a GGUF file: metadata, and the types, shapes and places of tensors.

File format (ggml, docs/gguf.md), little endian: magic, version, numbers of tensors and of metadata; metadata as key,
type and value; tensors as name, dims (the innermost first), type and offset; then the data, aligned.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 2**20
"""A bound well above published files, of which the vocabulary takes up to 10 MB."""
MAX_TENSORS = 2**17
MAX_KEYS = 2**14
MAX_ELEMENTS = 2**22
"""In all lists of the metadata. A vocabulary of 262,144 tokens takes a fourth of it, and an element up to 64 bytes."""
MAX_DIMS = 4
MAX_ALIGNMENT = 2**16
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor: its shape in the order of torch, its ggml type, and its place in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata by key, and the tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises CheckpointError for a file that is not GGUF, is cut off or damaged, with the place in the file."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24 or file.read(4) != MAGIC:
                raise CheckpointError(f"{path} must begin with GGUF; pass a GGUF file, or a checkpoint folder")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, size).header()
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from None


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size, self._at = path, data, size, 4
        self._elements = 0

    def header(self) -> GgufHeader:
        if (version := self._number("<I")) not in VERSIONS:
            raise self._damaged(f"version {version} is not supported; supported are 2 and 3, little endian")
        num_tensors = self._count("tensors", MAX_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(self._count("metadata", MAX_KEYS)):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the key {quoted(key)} occurs twice")
            metadata[key] = self._value(self._number("<I"), key)
        infos = [self._tensor() for _ in range(num_tensors)]
        start = self._aligned(metadata.get("general.alignment", 32))
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self._damaged(f"the tensor {quoted(name)} occurs twice")
            tensors[name] = GgufTensor(name, shape, kind, start + offset)
        return GgufHeader(self._path, metadata, tensors)

    def _aligned(self, alignment: object) -> int:
        """The start of the data."""
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT:
            raise self._damaged(f"'general.alignment' must be from 1 to {MAX_ALIGNMENT}, got {alignment!r:.40}")
        return -(-self._at // alignment) * alignment

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        rank = self._number("<I")
        if not 1 <= rank <= MAX_DIMS:
            raise self._damaged(f"the tensor {quoted(name)} must have 1 to {MAX_DIMS} dims, got {rank}")
        shape = tuple(self._number("<Q") for _ in range(rank))[::-1]
        kind, offset = self._number("<I"), self._number("<Q")
        if prod(shape) > 2**48 or offset > self._size:
            raise self._damaged(f"the tensor {quoted(name)} of the shape {list(shape)} is outside of the file")
        return name, shape, kind, offset

    def _count(self, what: str, most: int) -> int:
        found: int = self._number("<Q")
        if found > most:
            raise self._damaged(f"it must have at most {most} {what}, got {found}")
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(kind, key)
        inner = self._number("<I")
        count = self._number("<Q")
        if inner != _STRING and inner not in _NUMBERS:
            raise self._damaged(f"{quoted(key)} has elements of the unknown type {inner}")
        width = 8 if inner == _STRING else struct.calcsize(_NUMBERS[inner])  # a string has its length
        if count * width > self._size - self._at:
            raise self._damaged(f"the list of {quoted(key)} with {count} elements is outside of the file")
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise self._damaged(f"lists must have at most {MAX_ELEMENTS} elements, with {quoted(key)} they have more")
        if inner == _STRING:
            return [self._string() for _ in range(count)]
        return [value for (value,) in struct.iter_unpack(_NUMBERS[inner], self._bytes(width * count))]

    def _scalar(self, kind: int, key: str) -> Any:
        if kind not in _NUMBERS:
            raise self._damaged(f"{quoted(key)} has the unknown type {kind}")
        return self._number(_NUMBERS[kind])

    def _string(self) -> str:
        raw = self._bytes(self._number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("utf-8", errors="replace")  # tokens of some vocabularies

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > self._size:
            raise self._damaged(f"it is cut off after {self._size} bytes")
        if end > MAX_HEADER_BYTES:
            raise self._damaged(f"its header must have at most {MAX_HEADER_BYTES} bytes")
        found = self._data[self._at : end]
        self._at = end
        return found

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: byte {self._at} of the header: {reason}; download it again")
