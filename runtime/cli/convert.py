"""Command `sagellm convert`: writes a checkpoint folder as a GGUF file, or a GGUF file as a folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sageLLM.runtime.cli.progress import show_progress
from sageLLM.runtime.core.printable import printable
from sageLLM.runtime.errors import MAX_MESSAGE_LEN, SageError


def convert(model: Path, out: Path, form: str | None) -> int:
    """Prints the numbers of tensors by format, and the progress to a terminal. Exit code 1: an error."""
    from sageLLM.runtime.convert.convert import convert as write_converted  # torch, only for this
    from sageLLM.runtime.registry.plugins import load_registry

    start = time.monotonic()
    try:
        done = write_converted(model, out, load_registry(), form, show_progress)
    except (SageError, OSError) as error:
        print(f"error: {printable(str(error), MAX_MESSAGE_LEN)}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{count} tensors in {form}" for form, count in done.items())
    print(f"{out}: {counts}, written in {time.monotonic() - start:.1f} s")
    return 0
