"""Converts models between checkpoint folders and GGUF files. A target appears when it is whole."""

from __future__ import annotations

from pathlib import Path

from sageLLM.runtime.convert.source import Progress, open_source
from sageLLM.runtime.convert.to_folder import float_type, write_folder
from sageLLM.runtime.convert.to_gguf import write_gguf
from sageLLM.runtime.loader.draft import draft_of
from sageLLM.runtime.registry.plugins import Registry

GGUF_SUFFIX = ".gguf"
GGUF_DEFAULT = "bfloat16"


def convert(
    model: Path,
    out: Path,
    registry: Registry,
    form: str | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, int]:
    """Writes `model`, a folder or a GGUF file, as the GGUF file or the folder `out`, with weights in the format `form`.

    By default that is bfloat16 for a file, and the type of the model for a folder. Returns the numbers of tensors by
    format, of a file those of matrices: some have another, by a recipe or for rows of incomplete blocks. Raises
    CheckpointError for a model or a format that cannot be written, and if `out` exists.
    """
    with draft_of(out) as draft:
        source = open_source(model, registry)
        try:
            if out.suffix == GGUF_SUFFIX:
                form = (form or GGUF_DEFAULT).lower()  # users know names such as Q4_K_M
                return write_gguf(source, draft, form, registry, progress)
            form = form or float_type(source)
            return {form: write_folder(source, draft, form, progress)}
        finally:
            source.checkpoint.close()
