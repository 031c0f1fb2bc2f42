"""Writes a quantised copy of a checkpoint: linear weights as codes of a scheme, everything else as it is.

One tensor is in memory at a time; with calibration, one layer (`calibration.py`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.config_file import read_config_file
from sageLLM.runtime.loader.draft import draft_of
from sageLLM.runtime.loader.quantization import find_in_config
from sageLLM.runtime.loader.safetensors_reader import Checkpoint, TensorInfo
from sageLLM.runtime.loader.safetensors_writer import Entry, SafetensorsWriter
from sageLLM.runtime.quantize.calibration import Calibration
from sageLLM.runtime.quantize.gptq import Hessian, compensated, output_error
from sageLLM.runtime.quantize.rounding import Codes, Rounding
from sageLLM.runtime.quantize.scheme import Scheme
from sageLLM.runtime.registry.plugins import Registry

FILE = "model.safetensors"
OTHER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
Progress = Callable[[int, int], None]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_KEPT = re.compile(r"\.(gate|router|shared_expert_gate)\.weight$")
"""Routers: a small error there selects another expert."""
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative squared errors of the outputs of a weight on the calibration texts: compensated, and of the nearest."""

    compensated: float
    nearest: float


@dataclass(slots=True)
class Quantised:
    """The result: the number of quantised weights, and the errors of those that were compensated, by name."""

    num_weights: int
    errors: dict[str, Errors] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Copy:
    """The weights to quantise, by the names that they get; `source` has them by their names in the checkpoint."""

    checkpoint: Checkpoint
    scheme: Scheme
    source: dict[str, str]

    def entries(self) -> dict[str, Entry]:
        """The types and shapes of the tensors of the copy."""
        found: dict[str, Entry] = {}
        for name in dict.fromkeys((*self.checkpoint, *self.source)):
            info = self.checkpoint.info(self.source.get(name, name))
            if name in self.source:
                stem = name.removesuffix("weight")
                found |= {stem + key: one for key, one in self.scheme.entries(info.shape, info.dtype).items()}
            else:
                found[name] = (info.dtype, info.shape)
        return found


def quantize_checkpoint(
    folder: Path,
    out: Path,
    scheme: Scheme,
    registry: Registry,
    *,
    sequences: Sequence[Sequence[int]] | None = None,
    include_head: bool = False,
    progress: Progress = lambda done, total: None,
) -> Quantised:
    """Writes the copy to the new folder `out`.

    With token `sequences`, errors are compensated for them (GPTQ); else each element is rounded to the nearest code.
    With `include_head` the output head is quantised too; one that is tied to the embedding becomes a separate weight.
    `progress(done, total)` counts bytes of weights. Raises CheckpointError for a checkpoint that is quantised already
    or lacks linear weights that the scheme fits, and if `out` exists.
    """
    config = read_config_file(folder / "config.json")
    if find_in_config(config, folder) is not None:
        raise CheckpointError(f"{folder} is quantised already; use a checkpoint with float weights")
    with draft_of(out) as draft:
        return _write(folder, draft, scheme, registry, config, sequences, progress, include_head=include_head)


def _write(
    folder: Path,
    draft: Path,
    scheme: Scheme,
    registry: Registry,
    config: dict[str, Any],
    sequences: Sequence[Sequence[int]] | None,
    progress: Progress,
    *,
    include_head: bool,
) -> Quantised:
    """Writes the copy to the new folder `draft`."""
    checkpoint = Checkpoint.open(folder)
    calibration = Calibration(folder, registry, sequences or [[0]]) if sequences or include_head else None
    source = {name: name for name in checkpoint if _is_linear(checkpoint.info(name), scheme)}
    if include_head and calibration is not None:
        source |= _head(calibration.head, checkpoint, scheme, folder)
        config = config if _HEAD in checkpoint else _untied(config)
    if not source:
        raise CheckpointError(f"{folder} must have linear weights with whole groups of inputs; use another --format")
    copy = _Copy(checkpoint, scheme, source)
    ignored = [name.removesuffix(".weight") for name in checkpoint if _is_ignored(checkpoint.info(name), source)]
    draft.mkdir()
    _copy_files(folder, draft)
    text = json.dumps({**config, "quantization_config": scheme.section(ignored)}, indent=2)
    (draft / "config.json").write_text(text, encoding="utf-8")
    with SafetensorsWriter(draft / FILE, copy.entries()) as file:
        writing = _Writing(copy, file, registry, progress)
        if sequences:
            assert calibration is not None, "made for the sequences"
            calibration.run(frozenset(source.values()), writing.compensate)
        writing.write_others()
    return Quantised(len(source), writing.errors)


class _Writing:
    """The tensors that are written, and those that are left."""

    def __init__(self, copy: _Copy, file: SafetensorsWriter, registry: Registry, progress: Progress) -> None:
        self._copy, self._file, self._values, self._progress = copy, file, registry.format_values, progress
        self._left = dict.fromkeys((*copy.checkpoint, *copy.source))
        self._targets = {stored: name for name, stored in copy.source.items()}
        self._total = sum(self._info(name).num_bytes for name in self._left)
        self._done = 0
        self.errors: dict[str, Errors] = {}

    def compensate(self, stored: str, hessian: Hessian) -> Tensor:
        """Writes a weight with compensated errors; returns the values of its codes."""
        name = self._targets[stored]
        weight = self._copy.checkpoint.read(stored)
        rounding = Rounding(self._copy.scheme, weight.dtype)
        codes = compensated(weight, hessian, rounding, stored)
        self.errors[name] = Errors(
            output_error(weight, codes, hessian), output_error(weight, rounding.nearest(weight), hessian)
        )
        self._write_codes(name, codes)
        return codes.values

    def write_others(self) -> None:
        """Writes the tensors that are left: weights with the nearest codes, and all others as they are."""
        for name in list(self._left):
            tensor = self._copy.checkpoint.read(self._copy.source.get(name, name))
            if name in self._copy.source:
                self._write_codes(name, Rounding(self._copy.scheme, tensor.dtype).nearest(tensor))
            else:
                self._file.write(name, tensor)
                self._count(name)

    def _write_codes(self, name: str, codes: Codes) -> None:
        parts = [codes.scales, *([codes.zeros] if codes.zeros is not None else [])]
        for key, tensor in self._copy.scheme.stored(self._values, codes.codes, *parts).items():
            if tensor.dtype in _FLOATS and not tensor.isfinite().all():  # a scale, and so the weights of its group
                raise CheckpointError(
                    f"{self._copy.checkpoint.folder}: {quoted(name)} has values that {self._copy.scheme.name} does not "
                    "have, or that are not finite; use another --format, or a whole download"
                )
            self._file.write(name.removesuffix("weight") + key, tensor)
        self._count(name)

    def _count(self, name: str) -> None:
        del self._left[name]
        self._done += self._info(name).num_bytes
        self._progress(self._done, self._total)

    def _info(self, name: str) -> TensorInfo:
        return self._copy.checkpoint.info(self._copy.source.get(name, name))


def _head(stored: str | None, checkpoint: Checkpoint, scheme: Scheme, folder: Path) -> dict[str, str]:
    """The output head by the name that it gets."""
    if stored is None or stored not in checkpoint:
        raise CheckpointError(f"{folder} must have an output head for --include-head")
    if (reason := scheme.why_not(checkpoint.info(stored).shape)) is not None:
        raise CheckpointError(f"the output head cannot be quantised as {scheme.name}: {reason}")
    return {_HEAD: stored}


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model with a separate head."""
    return {**config, "tie_word_embeddings": False}


def _copy_files(folder: Path, draft: Path) -> None:
    for path in (path for pattern in OTHER_FILES for path in folder.glob(pattern)):
        if not path.name.endswith(".safetensors.index.json"):
            shutil.copyfile(path, draft / path.name)


def _is_linear(info: TensorInfo, scheme: Scheme) -> bool:
    """Whether a tensor is the weight of a linear layer inside of the model's layers, with whole groups and words."""
    is_weight = len(info.shape) == 2 and info.dtype in _FLOATS and info.name.endswith(".weight")
    if not is_weight or not re.search(r"\.\d+\.", info.name) or _KEPT.search(info.name):
        return False
    return scheme.why_not(info.shape) is None


def _is_ignored(info: TensorInfo, quantised: Iterable[str]) -> bool:
    is_matrix = len(info.shape) == 2 and info.name.endswith(".weight")
    return is_matrix and info.name not in quantised and not re.search(r"(embed|wte|wpe)\w*\.weight$", info.name)
