"""Writes a safetensors file tensor by tensor, in any order: the header follows from types and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.loader.safetensors_reader import TORCH_DTYPES

Entry = tuple[torch.dtype, tuple[int, ...]]
"""The element type and the shape of a tensor."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class SafetensorsWriter:
    """A file with the tensors `entries`, each of which `write` fills in."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        """Writes the header. Raises OSError if the file cannot be written."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._starts: dict[str, int] = {}
        self._entries = dict(entries)
        end = 0
        for name, (dtype, shape) in entries.items():
            start, end = end, end + prod(shape) * dtype.itemsize
            self._starts[name] = start
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor in the type of its entry."""
        dtype, shape = self._entries[name]
        assert tensor.shape == shape, f"{name} must have the shape {shape}, got {tuple(tensor.shape)}"
        self._file.seek(self._data + self._starts[name])
        self._file.write(tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
