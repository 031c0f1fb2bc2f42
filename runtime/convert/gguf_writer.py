"""Writes a GGUF file tensor by tensor, in any order: the header follows from metadata, types and shapes alone.

File format (ggml, docs/gguf.md), as `loader/gguf_reader.py` reads it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from sageLLM.runtime.loader.gguf_reader import MAGIC

VERSION = 3
ALIGNMENT = 32
Metadata = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """A tensor to write: its shape in the order of torch, its ggml type, and its bytes."""

    shape: tuple[int, ...]
    type: int
    num_bytes: int


class GgufWriter:
    """A file with the tensors `entries`, which `write` fills in."""

    def __init__(self, path: Path, metadata: Mapping[str, Metadata], entries: Mapping[str, GgufEntry]) -> None:
        """Writes the header. Raises OSError if the file cannot be written."""
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
        parts += [_text(key) + _typed(value) for key, value in metadata.items()]
        self._starts: dict[str, int] = {}
        end = 0
        for name, entry in entries.items():
            dims = entry.shape[::-1]
            parts.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.type, end))
            self._starts[name] = end
            end += _aligned(entry.num_bytes)
        header = b"".join(parts)
        self._data = _aligned(len(header))
        self._file = path.open("wb")
        self._file.write(header)
        self._file.truncate(self._data + end)

    def write(self, name: str, blocks: Tensor, start: int = 0) -> None:
        """Writes bytes u8[...] of a tensor from its byte `start` on."""
        self._file.seek(self._data + self._starts[name] + start)
        self._file.write(blocks.contiguous().numpy().data)

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Metadata) -> bytes:
    """A value with its type: numbers of 32 bits, as llama.cpp expects them."""
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            if 0 <= value < 2**32:
                return struct.pack("<II", _U32, value)
            return struct.pack("<Ii", _I32, value) if value < 0 else struct.pack("<IQ", _U64, value)
        case float():
            return struct.pack("<If", _F32, value)
        case str():
            return struct.pack("<I", _STRING) + _text(value)
    return _list(value)


def _list(values: Sequence[int] | Sequence[float] | Sequence[str]) -> bytes:
    head = struct.pack("<I", _ARRAY)
    if any(isinstance(one, str) for one in values):
        return head + struct.pack("<IQ", _STRING, len(values)) + b"".join(_text(str(one)) for one in values)
    kind, form = (_F32, "f") if any(isinstance(one, float) for one in values) else (_I32, "i")
    return head + struct.pack(f"<IQ{len(values)}{form}", kind, len(values), *values)
