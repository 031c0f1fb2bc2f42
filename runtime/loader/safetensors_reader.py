"""Reads the tensors of a Hugging Face checkpoint folder: safetensors files, headers first, data memory-mapped.

File format: 8 bytes of header length (little endian), a JSON header of {name: {dtype, shape, data_offsets}}, then the
data (https://huggingface.co/docs/safetensors). Pickled checkpoints are rejected, because loading one can run code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.kernels.cpu.coded import CodedWeight
from sageLLM.runtime.loader.checkpoint_index import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    damaged,
    has_single_file,
    json_object,
    weight_map,
)

# Bounds on a file's header, well above those of published checkpoints (30 MB and 200,000 tensors for 10^12 parameters
# in one file, 5 dimensions). The format allows 100 MB, from which Python would build gigabytes of objects.
MAX_HEADER_BYTES = 48 * 2**20
MAX_TENSORS = 2**18
MAX_DIMS = 16
MAX_SIZE = 2**63 - 1
MAX_FILE_NAME_LEN = 255
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in the header of its file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a checkpoint by name. `open` reads headers only; `read` maps the file that it needs.

    Tensors that `read` returns may share the mapping, which lives as long as they do: `close` only drops this object's
    reference.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self._infos = dict(infos)
        self._files: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Raises `CheckpointError` for a missing, incomplete, damaged or pickled checkpoint."""
        root = Path(folder)
        if not root.is_dir():
            raise CheckpointError(f"{root} is not a folder; pass the folder of a Hugging Face checkpoint")
        if has_single_file(root):
            return cls(root, read_header(root / SINGLE_FILE))
        if (root / INDEX_FILE).is_file():
            return cls(root, _read_shards(root))
        raise CheckpointError(_no_safetensors(root))

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def names(self) -> Set[str]:
        return self._infos.keys()

    def info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise CheckpointError(f"expected the tensor {quoted(name)} in {self.folder}")
        return self._infos[name]

    def stored(self) -> dict[str, StoredTensor]:
        """The shapes and element types of the tensors by name."""
        return {
            name: StoredTensor(info.shape, str(info.dtype).removeprefix("torch.")) for name, info in self._infos.items()
        }

    def read(self, name: str, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, or rows[start:stop] of its first dimension. Only these bytes of the file are read.

        A checkpoint that computes tensors does so in `dtype`; this one returns them as they are stored.
        """
        info = self.info(name)
        try:
            file = self._file(info.file)
            if rows is None or not info.shape:
                return _tensor(file.get_tensor(info.name))
            start, stop, _ = slice(rows.start, rows.stop).indices(info.shape[0])
            return _tensor(file.get_slice(info.name)[start:stop])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file} cannot be read: {error}; download it again") from None

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is stored in a format."""
        return False

    @property
    def declared_activations(self) -> str | None:
        """The type of activations that the settings of the quantised weights declare, such as int8."""
        return None

    def read_codes(self, name: str, dtype: torch.dtype) -> CodedWeight | str | None:
        """A quantised weight as codes for kernels of the element type `dtype`, or the reason why not.

        None for a tensor that is not quantised, as are all tensors here.
        """
        return None

    def close(self) -> None:
        """Closes the files; a later `read` opens them again."""
        self._files.clear()

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt", device="cpu")
        return self._files[path]


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise AssertionError("safetensors must return torch tensors")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors in a file's header, in file order, checked against the length of the file.

    The checks come before the library sees the file, so that a truncated download is reported as such.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_len = int.from_bytes(file.read(8), "little")
            if size < 8 or header_len > size - 8:  # a damaged length could request exabytes
                raise CheckpointError(damaged(path, f"its {size} bytes do not contain a header"))
            if header_len > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: the header must have at most {MAX_HEADER_BYTES} bytes, got {header_len}; "
                    "split the checkpoint into shards"
                )
            header = json_object(path, file.read(header_len))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)  # free text, not a tensor
    if len(header) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} must have at most {MAX_TENSORS} tensors, got {len(header)}; split the checkpoint into shards"
        )
    infos = {name: _tensor_info(path, name, entry) for name, entry in header.items()}
    needed = 8 + header_len + max((_end_of(path, name, entry) for name, entry in header.items()), default=0)
    if size < needed:
        raise CheckpointError(damaged(path, f"it is cut off after {size} of {needed} bytes"))
    return infos


def _read_shards(root: Path) -> dict[str, TensorInfo]:
    index = root / INDEX_FILE
    shards: dict[str, dict[str, TensorInfo]] = {}
    infos = {}
    for name, file_name in weight_map(index).items():
        if file_name not in shards:
            shards[file_name] = read_header(_shard_path(index, file_name))
        if name not in shards[file_name]:
            raise CheckpointError(f"{index} lists the tensor {quoted(name)} in {file_name}, which does not contain it")
        infos[name] = shards[file_name][name]
    return infos


def _shard_path(index: Path, file_name: str) -> Path:
    """The path of a shard. Names with a folder are rejected: they could read any file of the machine."""
    if file_name in ("", ".", "..") or "/" in file_name or "\\" in file_name or "\0" in file_name:
        raise CheckpointError(f"{index}: shards must be in the folder of the index, got the file {quoted(file_name)}")
    if not file_name.endswith(".safetensors"):
        raise CheckpointError(f"{index}: shards must be .safetensors files, got the file {quoted(file_name)}")
    path = index.parent / file_name
    # A name that is longer than file systems allow raises OSError in is_file.
    if len(file_name.encode(errors="replace")) > MAX_FILE_NAME_LEN or not path.is_file():
        raise CheckpointError(f"{index} lists the file {quoted(file_name)}, which is missing; download it again")
    return path


def _no_safetensors(root: Path) -> str:
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{root} has only pickled weights ({pickles[0]}), which can run code when loaded; convert them once with "
            "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    if ggufs := sorted(path.name for path in root.glob("*.gguf")):
        return f"{root} has only GGUF weights ({ggufs[0]}); pass the file in place of the folder"
    others = sorted(path.name for path in root.glob("*.safetensors"))
    found = f"; found {', '.join(others[:3])}" if others else ""
    return f"{root} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}"


def _tensor_info(path: Path, name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict):
        raise CheckpointError(
            damaged(path, f"the header entry of {quoted(name)} must be an object, got {shown(entry)}")
        )
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if shape is None or not _is_sizes(shape):
        raise CheckpointError(damaged(path, f"the shape of {quoted(name)} must be a list of sizes, got {shown(shape)}"))
    if len(shape) > MAX_DIMS:
        raise CheckpointError(f"{path}: the tensor {quoted(name)} must have at most {MAX_DIMS} dims, got {len(shape)}")
    if not isinstance(dtype, str):
        raise CheckpointError(damaged(path, f"the dtype of {quoted(name)} must be text, got {shown(dtype)}"))
    if dtype not in TORCH_DTYPES:  # F4, F6_E2M3, C64 and other types of later files, and misspelt ones
        raise CheckpointError(
            f"{path}: the tensor {quoted(name)} has the element type {shown(dtype)}, which is not supported; "
            "use a checkpoint with float32, bfloat16 or float16 weights"
        )
    info = TensorInfo(name, tuple(shape), TORCH_DTYPES[dtype], path)
    start, end = _offsets(path, name, entry)
    if end - start != info.num_bytes:
        raise CheckpointError(damaged(path, f"expected {info.num_bytes} bytes for {quoted(name)}, got {end - start}"))
    return info


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_SIZE for v in value)


def _offsets(path: Path, name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    offsets = entry.get("data_offsets")
    if offsets is None or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            damaged(path, f"the data_offsets of {quoted(name)} must be two offsets, got {shown(offsets)}")
        )
    return offsets[0], offsets[1]


def _end_of(path: Path, name: str, entry: Mapping[str, Any]) -> int:
    return _offsets(path, name, entry)[1]
