"""Writes a model as a checkpoint folder of Hugging Face, with float weights: safetensors, config and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from sageLLM.runtime.convert.source import FLOATS, Progress, Source, out_of_range
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.quantization import CONFIG_KEYS, SETTINGS_FILES
from sageLLM.runtime.loader.safetensors_writer import SafetensorsWriter
from sageLLM.runtime.quantize.checkpoint import FILE, OTHER_FILES


def float_type(source: Source) -> str:
    """The float type of a model, by its config."""
    return str(source.data.get("dtype") or source.data.get("torch_dtype") or "bfloat16")


def write_folder(source: Source, out: Path, form: str, progress: Progress) -> int:
    """Writes the folder `out` with weights of the type `form`; returns their number.

    Raises CheckpointError for another type, and for a weight with values that the type does not have.
    """
    if form not in FLOATS:
        raise CheckpointError(f"--format of a folder must be one of {', '.join(FLOATS)}, got {quoted(form)}")
    out.mkdir()
    for path in (path for pattern in OTHER_FILES for path in source.folder.glob(pattern)):
        if not path.name.endswith(".safetensors.index.json") and path.name not in SETTINGS_FILES:
            shutil.copyfile(path, out / path.name)
    config = {key: value for key, value in source.data.items() if key not in (*CONFIG_KEYS, "torch_dtype")}
    (out / "config.json").write_text(json.dumps({**config, "dtype": form}, indent=2), encoding="utf-8")
    checkpoint, dtype = source.checkpoint, FLOATS[form]
    entries = {name: (dtype, checkpoint.info(name).shape) for name in checkpoint}
    total = sum(checkpoint.info(name).num_bytes for name in checkpoint)
    done = 0
    with SafetensorsWriter(out / FILE, entries) as file:
        for name in checkpoint:
            tensor = checkpoint.read(name, dtype=dtype).to(dtype)
            if not tensor.isfinite().all() and checkpoint.read(name, dtype=torch.float32).isfinite().all():
                raise out_of_range(source, name, form)
            file.write(name, tensor)
            done += checkpoint.info(name).num_bytes
            progress(done, total)
    return len(entries)
