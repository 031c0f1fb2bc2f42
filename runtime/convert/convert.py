"""Converts models between checkpoint folders and GGUF files. A target appears when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sageLLM.runtime.convert.source import open_source
from sageLLM.runtime.convert.to_folder import write_folder
from sageLLM.runtime.convert.to_gguf import write_gguf
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.registry.plugins import Registry

GGUF_SUFFIX = ".gguf"
GGUF_DEFAULT = "bfloat16"
Progress = Callable[[int, int], None]


def convert(
    model: Path,
    out: Path,
    registry: Registry,
    form: str | None = None,
    progress: Progress = lambda done, total: None,
) -> int:
    """Writes `model`, a folder or a GGUF file, as the GGUF file or the folder `out`; returns the number of tensors.

    `form` is the format of the weights. `progress(done, total)` counts bytes of them. Raises CheckpointError for a
    model or a format that cannot be written, and if `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another path")
    source = open_source(model, registry)
    draft = out.with_name(f"{out.name}.part")
    try:
        _remove(draft)
        if out.suffix == GGUF_SUFFIX:
            out.parent.mkdir(parents=True, exist_ok=True)
            found = write_gguf(source, draft, form or GGUF_DEFAULT, registry, progress)
        else:
            found = write_folder(source, draft, form, progress)
        draft.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        _remove(draft)
        source.checkpoint.close()
    return found


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.unlink(missing_ok=True)
