"""The model to convert: a checkpoint folder or a GGUF file, with its config as the layout reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.stored import with_stored_ties
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.config_file import layout_of, read_config_file
from sageLLM.runtime.loader.gguf_folder import gguf_folder
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.loader.quantization import find_in_config, refuse_unsupported
from sageLLM.runtime.loader.safetensors_reader import Checkpoint
from sageLLM.runtime.loader.weights import have_equal_values
from sageLLM.runtime.registry.plugins import Registry

FLOATS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The formats without codes, of files and folders."""
Progress = Callable[[int, int], None]
"""Gets the bytes that have been converted, and those of the whole model."""


class RecordedConfig(HFConfig):
    """A config that records the values that a layout reads, defaults included, by their keys."""

    def __init__(self, data: dict[str, Any], path: str) -> None:
        super().__init__(data, path)
        self.values: dict[str, Any] = {}

    def _read(self, keys: Sequence[str], default: Any, kind: type[Any], expected: str) -> Any:
        return self._recorded(keys, super()._read(keys, default, kind, expected))

    def float(self, key: str, *fallbacks: str, default: Any = None) -> float:
        found = super().float(key, *fallbacks) if default is None else super().float(key, *fallbacks, default=default)
        return float(self._recorded((key, *fallbacks), found))

    def _recorded(self, keys: Sequence[str], value: Any) -> Any:
        for key in keys:
            self.values[key.rpartition(".")[2]] = value
        return value


@dataclass(frozen=True, slots=True)
class Source:
    """The folder of the model, its config.json, its layout, and the weights, which are floats when they are read.

    `sizes` is the config of the layout, and `values` those of config.json and its defaults, as far as they are read.
    """

    folder: Path
    data: dict[str, Any]
    layout: ModelLayout
    sizes: Any
    values: dict[str, Any]
    checkpoint: Checkpoint


def out_of_range(source: Source, weight: str, form: str) -> CheckpointError:
    """The error of a weight with values that are infinite in the format."""
    return CheckpointError(
        f"{source.folder}: {quoted(weight)} has values that {form} does not have; use another --format"
    )


def open_source(model: Path, registry: Registry) -> Source:
    """Raises CheckpointError for a model that cannot be loaded."""
    folder = gguf_folder(model) if model.is_file() else model
    path = folder / "config.json"
    data = read_config_file(path)
    layout = layout_of(data, path, registry.models)
    refuse_unsupported(find_in_config(data, folder), folder, registry.methods)
    config = RecordedConfig(data, str(path))
    try:
        sizes = layout.read_config(config)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    checkpoint = open_checkpoint(folder, registry)
    are_equal = partial(have_equal_values, checkpoint, torch.float32)
    layout = with_stored_ties(layout, sizes, checkpoint.names, are_equal)
    return Source(folder, data, layout, sizes, config.values, checkpoint)
