"""Makes a checkpoint folder of a GGUF file: config and tokenizer from its metadata, and a link to the file."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.kernels.cpu.cache import cache_folder
from sageLLM.runtime.loader.gguf_architectures import ROPE_FACTORS, config_of
from sageLLM.runtime.loader.gguf_reader import GgufHeader, read_gguf_header
from sageLLM.runtime.loader.gguf_tokenizer import huggingface_tokenizer, tokenizer_of

WEIGHTS = "model.gguf"
SUFFIX = ".gguf"
VERSION = b"4"
"""Changes with the content of the folder."""
NO_VOCABULARY = "none"
"""The kind of tokenizer of a file without one, or with one that only Hugging Face's format has."""
_F32, _F16 = 0, 1


def gguf_folder(path: Path) -> Path:
    """The folder of the file in the user's cache, made when it is absent.

    Raises CheckpointError or TokenizerError for a file that is damaged or not supported.
    """
    try:
        status = path.stat()
        facts = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        name = hashlib.sha256(VERSION + facts.encode()).hexdigest()[:24]
        folder = cache_folder() / "gguf" / f"{path.stem[:60]}-{name}"
        if not (folder / WEIGHTS).exists():
            _make(folder, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read, or its folder not be written: {error}") from None
    return folder


def _make(folder: Path, path: Path) -> None:
    header = read_gguf_header(path)
    files = _files(header)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        for name, content in files.items():
            Path(draft, name).write_text(json.dumps(content), encoding="utf-8")
        Path(draft, WEIGHTS).symlink_to(path.resolve())
        try:
            Path(draft).rename(folder)
        except OSError:
            if not (folder / WEIGHTS).exists():  # another process made it meanwhile
                raise
        Path(draft).mkdir(exist_ok=True)  # removed at the end


def _files(header: GgufHeader) -> dict[str, Any]:
    config = config_of(header, _rope_factors(header), _dtype(header))
    eos = {header.metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id", "eom_token_id")}
    generation = {"eos_token_id": sorted(found for found in eos if isinstance(found, int))}
    files = {
        "config.json": config,
        "generation_config.json": generation if generation["eos_token_id"] else {},
    }
    if header.metadata.get("tokenizer.ggml.model") == NO_VOCABULARY:
        return files | huggingface_tokenizer(header)
    tokenizer, settings = tokenizer_of(header)
    return {**files, "tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _rope_factors(header: GgufHeader) -> list[float] | None:
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type != _F32 or len(tensor.shape) != 1 or tensor.shape[0] > 2**16:
        raise CheckpointError(f"{header.path}: the tensor '{ROPE_FACTORS}' must have one dim of float32")
    found = np.fromfile(header.path, "<f4", tensor.shape[0], offset=tensor.start)
    return [float(value) for value in found]


def _dtype(header: GgufHeader) -> str:
    """The element type for the weights: that of plain ones, else bfloat16."""
    types = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return "float32" if types <= {_F32} else "float16" if types <= {_F32, _F16} else "bfloat16"
