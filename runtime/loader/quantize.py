"""Writes a quantised copy of a checkpoint: linear weights rounded to the nearest code, as compressed-tensors has them.

One tensor is in memory at a time. The copy is loaded by sageLLM, and by transformers with compressed-tensors.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.config_file import read_config_file
from sageLLM.runtime.loader.quantization import find_in_config
from sageLLM.runtime.loader.safetensors_reader import TORCH_DTYPES, Checkpoint, TensorInfo

FILE = "model.safetensors"
OTHER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_KEPT = re.compile(r"\.(gate|router|shared_expert_gate)\.weight$")
"""Routers: a small error there selects another expert."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Symmetric codes of `bits` bits with a scale per group of `group` inputs, or per output."""

    bits: int
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """`int8`, or `int4-g128`. Raises CheckpointError."""
        if text == "int8":
            return cls(8)
        if (found := re.fullmatch(r"int4-g(16|32|64|128|256)", text)) is not None:
            return cls(4, int(found[1]))
        raise CheckpointError(f"--format must be int8 or int4-g16, -g32, -g64, -g128, -g256, got '{text[:40]}'")

    def settings(self, ignored: list[str]) -> dict[str, Any]:
        """The section `quantization_config`."""
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False,
                   "strategy": "channel" if self.group is None else "group", "group_size": self.group}  # fmt: skip
        form = "int-quantized" if self.bits == 8 else "pack-quantized"
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**group, "format": form}},
            "ignore": ignored,
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight [N, K] by the ends of their names."""
        rows, width = weight.shape
        groups = weight.float().reshape(rows, -1, self.group or width)
        scale = (groups.abs().amax(-1) * 2 / (2**self.bits - 1)).to(weight.dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        codes = torch.round(groups / scale.float()[..., None]).clamp(low, high).reshape(rows, width)
        if self.bits == 8:
            return {"weight": codes.to(torch.int8), "weight_scale": scale}
        packed = _packed((codes - low).to(torch.int32))
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([rows, width])}

    def shapes(self, info: TensorInfo) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The types and shapes of the stored tensors."""
        rows, width = info.shape
        scale = (info.dtype, (rows, width // (self.group or width)))
        if self.bits == 8:
            return {"weight": (torch.int8, info.shape), "weight_scale": scale}
        packed = (torch.int32, (rows, width // 8))
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": (torch.int64, (2,))}


def quantize_checkpoint(
    folder: Path, out: Path, scheme: Scheme, progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Writes the copy to the new folder `out`; returns the number of quantised weights.

    `progress(done, total)` counts bytes read. Raises CheckpointError for a checkpoint that is quantised already or
    lacks linear weights that the scheme fits, and if `out` exists.
    """
    config = read_config_file(folder / "config.json")
    if find_in_config(config, folder) is not None:
        raise CheckpointError(f"{folder} is quantised already; use a checkpoint with float weights")
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another folder")
    checkpoint = Checkpoint.open(folder)
    chosen = [name for name in checkpoint if _is_linear(checkpoint.info(name), scheme)]
    if not chosen:
        raise CheckpointError(f"{folder} must have linear weights with whole groups of inputs; use another --format")
    ignored = [name.removesuffix(".weight") for name in checkpoint if _is_ignored(checkpoint.info(name), chosen)]
    draft = out.with_name(f"{out.name}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for path in (path for pattern in OTHER_FILES for path in folder.glob(pattern)):
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, draft / path.name)
        text = json.dumps({**config, "quantization_config": scheme.settings(ignored)}, indent=2)
        (draft / "config.json").write_text(text, encoding="utf-8")
        with (draft / FILE).open("wb") as file:
            _write(file, checkpoint, frozenset(chosen), scheme, progress)
        draft.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from None
    return len(chosen)


def _is_linear(info: TensorInfo, scheme: Scheme) -> bool:
    """Whether a tensor is the weight of a linear layer inside of the model's layers, with whole groups and words."""
    is_weight = len(info.shape) == 2 and info.dtype in _FLOATS and info.name.endswith(".weight")
    if not is_weight or not re.search(r"\.\d+\.", info.name) or _KEPT.search(info.name):
        return False
    return info.shape[1] % (scheme.group or 1) == 0 and info.shape[1] % 8 == 0


def _is_ignored(info: TensorInfo, chosen: list[str]) -> bool:
    is_matrix = len(info.shape) == 2 and info.name.endswith(".weight")
    return is_matrix and info.name not in chosen and not re.search(r"(embed|wte|wpe)\w*\.weight$", info.name)


def _write(
    file: BinaryIO,
    checkpoint: Checkpoint,
    chosen: frozenset[str],
    scheme: Scheme,
    progress: Callable[[int, int], None],
) -> None:
    """A safetensors file: the header follows from shapes alone, so tensors are written one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in checkpoint:
        for key, (dtype, shape) in _entries(checkpoint.info(name), name in chosen, scheme):
            start, end = end, end + prod(shape) * dtype.itemsize
            header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    total = sum(checkpoint.info(name).num_bytes for name in checkpoint)
    done = 0
    for name in checkpoint:
        tensor = checkpoint.read(name)
        stored: Mapping[str, Tensor] = scheme.quantize(tensor) if name in chosen else {"": tensor}
        for one in stored.values():
            file.write(one.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        done += checkpoint.info(name).num_bytes
        progress(done, total)


def _entries(
    info: TensorInfo, is_chosen: bool, scheme: Scheme
) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    if not is_chosen:
        yield info.name, (info.dtype, info.shape)
        return
    for key, entry in scheme.shapes(info).items():
        yield info.name.removesuffix("weight") + key, entry


def _packed(codes: Tensor) -> Tensor:
    """int32 words of eight codes along the last dim, the first code in the lowest bits."""
    words = torch.zeros((codes.shape[0], codes.shape[1] // 8), dtype=torch.int32)
    for position in range(8):
        words |= codes[:, position::8] << 4 * position
    return words
