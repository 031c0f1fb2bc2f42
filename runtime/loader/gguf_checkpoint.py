"""The weights of a GGUF file as those of a Hugging Face checkpoint: names, the order of rows, and float values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import Extent, Format, QuantMethod, StoredPart
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.kernels.cpu.coded import CodedWeight
from sageLLM.runtime.loader.codes import coded, why_not_coded
from sageLLM.runtime.loader.dequantize import dequantize
from sageLLM.runtime.loader.gguf_architectures import ROPE_FACTORS, TensorName, architecture_of, name_of
from sageLLM.runtime.loader.gguf_reader import GgufHeader, GgufTensor, read_gguf_header
from sageLLM.runtime.loader.safetensors_reader import Checkpoint, TensorInfo

_BLOCKS = StoredPart("blocks", "u8", (Extent("N"), Extent("K") / "B"))


@dataclass(frozen=True, slots=True)
class _Source:
    """The rows of a tensor in the file from `start` on, in the `shape` of the checkpoint.

    Rows of `num_heads` heads are permuted if it is not 0; `offset` is added to the values.
    """

    tensor: GgufTensor
    format: Format
    shape: tuple[int, ...]
    start: int = 0
    num_heads: int = 0
    offset: float = 0.0


class GgufCheckpoint(Checkpoint):
    """The tensors of a file under the names of Hugging Face; experts are single tensors.

    Raises CheckpointError for a tensor of a type without a format, and one that is outside of the file.
    """

    def __init__(self, header: GgufHeader, method: QuantMethod, values: Mapping[str, Callable[..., Any]]) -> None:
        self._values = values
        self._path = header.path
        formats: dict[object, Format] = {kind: one for one in method.formats for kind in one.when["type"]}
        self._sources: dict[str, _Source] = {}
        for tensor in header.tensors.values():
            if tensor.name != ROPE_FACTORS:
                format = _format_of(tensor, formats, header, header.path.stat().st_size)
                self._sources |= _sources(tensor, format, header)
        infos = {name: TensorInfo(name, one.shape, torch.float32, header.path) for name, one in self._sources.items()}
        super().__init__(header.path.parent, infos)

    def read(self, name: str, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in `dtype`, by default float32."""
        self.info(name)
        source = self._sources[name]
        format, blocks, sizes = self._blocks(source)
        found = dequantize(format, self._values[format.name], blocks, sizes, dtype or torch.float32)
        found = found.view(source.shape)
        found = found + source.offset if source.offset else found
        found = _unpermuted(found, source.num_heads) if source.num_heads else found
        return found if rows is None else found[rows]

    @property
    def is_quantized(self) -> bool:
        return True

    def read_codes(self, name: str, dtype: torch.dtype) -> CodedWeight | str | None:
        source = self._sources[name]
        if len(source.shape) != 2 or source.format.sizes["B"] == 1:
            return None
        format, blocks, sizes = self._blocks(source)
        if (reason := why_not_coded(format, blocks, sizes)) is not None:
            return reason
        found = coded(format, self._values[f"{format.name}_codes"], blocks, sizes, dtype)
        return found.with_parts(lambda one: _unpermuted(one, source.num_heads)) if source.num_heads else found

    def _blocks(self, source: _Source) -> tuple[Format, dict[str, Tensor], dict[str, int]]:
        """The format of the blocks as one stored tensor, this tensor, and its sizes."""
        width = source.shape[-1]
        sizes = {"N": prod(source.shape[:-1]), "K": width, "B": int(source.format.sizes["B"])}
        row_bytes = width // sizes["B"] * (source.format.block_bytes or 0)
        start = source.tensor.start + source.start * row_bytes
        # Not mapped: pages of a mapping that were read count as memory of the process.
        raw = torch.from_numpy(np.fromfile(self._path, np.uint8, sizes["N"] * row_bytes, offset=start))
        if len(raw) != sizes["N"] * row_bytes:
            raise CheckpointError(f"{self._path} was cut off while it was read; download it again")
        blocks = raw.view(sizes["N"], -1, source.format.block_bytes or 1)
        return replace(source.format, tensors=(_BLOCKS,)), {"blocks": blocks}, sizes

    def close(self) -> None:
        """Nothing: the file is opened for each read."""


def open_gguf(path: Path, method: QuantMethod, values: Mapping[str, Callable[..., Any]]) -> GgufCheckpoint:
    return GgufCheckpoint(read_gguf_header(path), method, values)


def _format_of(tensor: GgufTensor, formats: Mapping[object, Format], header: GgufHeader, size: int) -> Format:
    if tensor.type not in formats:
        known = ", ".join(f"{one.name} ({kind})" for kind, one in formats.items())
        raise CheckpointError(
            f"{header.path}: the tensor {quoted(tensor.name)} has the type {tensor.type}, which is not supported; "
            f"supported are {known}"
        )
    format = formats[tensor.type]
    block_len = int(format.sizes["B"])
    if tensor.shape[-1] % block_len:
        raise CheckpointError(
            f"{header.path}: the rows of {quoted(tensor.name)} must be multiples of {block_len} elements, as those of "
            f"{format.name}, got {tensor.shape[-1]}; download it again"
        )
    end = tensor.start + prod(tensor.shape) // block_len * (format.block_bytes or 0)
    if end > size:
        raise CheckpointError(
            f"{header.path} is damaged: tensor {quoted(tensor.name)} ends at byte {end} of {size}; download it again"
        )
    return format


def _sources(tensor: GgufTensor, format: Format, header: GgufHeader) -> dict[str, _Source]:
    """The tensors of a checkpoint that one of the file contains: itself, or a stack of experts."""
    architecture = architecture_of(header)
    found = name_of(tensor.name, architecture)
    if found is None:
        return {tensor.name: _Source(tensor, format, tensor.shape)}  # reported as unused by the layout
    if found.has_experts and len(tensor.shape) == 3:
        experts, outputs, inputs = tensor.shape
        return {found.of(i): _Source(tensor, format, (outputs, inputs), start=i * outputs) for i in range(experts)}
    heads = permuted_heads(found, header.metadata) if architecture.is_permuted else 0
    if heads and (type(heads) is not int or tensor.shape[0] % (2 * heads)):
        raise CheckpointError(
            f"{header.path}: the rows of {quoted(tensor.name)} must be pairs in {heads!r:.20} heads, got "
            f"{tensor.shape[0]}; download it again"
        )
    shape = (1, *tensor.shape) if found.stem in architecture.rows and len(tensor.shape) == 1 else tensor.shape
    offset = -1.0 if architecture.adds_one and is_norm(found) else 0.0
    return {found.name: _Source(tensor, format, shape, num_heads=heads, offset=offset)}


def permuted_heads(name: TensorName, metadata: Mapping[str, Any]) -> Any:
    """The heads of a tensor with permuted rows, from the metadata; 0 for another tensor."""
    key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.stem)
    arch = metadata["general.architecture"]
    default = metadata.get(f"{arch}.attention.head_count", 0)
    return 0 if key is None else metadata.get(f"{arch}.attention.{key}", default)


def is_norm(name: TensorName) -> bool:
    return name.name.endswith("norm.weight")


def _unpermuted(x: Tensor, num_heads: int) -> Tensor:
    """The rows of each head in halves, where the file has the two components of a pair one after the other."""
    return x.reshape(num_heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
