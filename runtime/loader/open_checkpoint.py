"""Opens the weights of a checkpoint folder: float ones as they are stored, quantised ones as float weights."""

from pathlib import Path

from sageLLM.runtime.loader.checkpoint_index import has_single_file
from sageLLM.runtime.loader.config_file import read_config_file
from sageLLM.runtime.loader.format_choice import choose_formats
from sageLLM.runtime.loader.gguf_architectures import METHOD
from sageLLM.runtime.loader.gguf_checkpoint import open_gguf
from sageLLM.runtime.loader.gguf_folder import WEIGHTS
from sageLLM.runtime.loader.quantization import find_in_config, method_of
from sageLLM.runtime.loader.quantized_checkpoint import QuantizedCheckpoint
from sageLLM.runtime.loader.safetensors_reader import Checkpoint
from sageLLM.runtime.registry.plugins import Registry


def open_checkpoint(folder: Path, registry: Registry) -> Checkpoint:
    """The checkpoint, of which only headers are read.

    Raises CheckpointError for damaged files, and for settings or tensors of a format that are not understood.
    """
    if (folder / WEIGHTS).exists() and not has_single_file(folder):
        return open_gguf(folder / WEIGHTS, registry.methods[METHOD], registry.format_values[METHOD])
    found = find_in_config(read_config_file(folder / "config.json"), folder)
    method = None if found is None else method_of(found, registry.methods)
    stored = Checkpoint.open(folder)
    if found is None or method is None or found.settings is None:
        return stored
    quantized = choose_formats(method, found.settings, found.source, folder)
    return QuantizedCheckpoint(stored, quantized, registry.format_values)
