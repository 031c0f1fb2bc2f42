"""Command `sagellm quantize`: writes a quantised copy of a checkpoint folder."""

import sys
import time
from pathlib import Path

from sageLLM.runtime.core.printable import printable
from sageLLM.runtime.errors import MAX_MESSAGE_LEN, SageError

WIDTH = 30
"""Characters of the progress bar."""


def quantize(model: Path, out: Path, scheme: str) -> int:
    """Prints the number of weights, and the progress to a terminal. Exit code 1: an error."""
    from sageLLM.runtime.loader.quantize import Scheme, quantize_checkpoint  # torch, only for this

    start = time.monotonic()
    try:
        count = quantize_checkpoint(model, out, Scheme.parse(scheme), _show_progress)
    except SageError as error:
        print(f"error: {printable(str(error), MAX_MESSAGE_LEN)}", file=sys.stderr)
        return 1
    print(f"{out}: {count} weights in {scheme}, written in {time.monotonic() - start:.1f} s")
    return 0


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        filled = WIDTH * done // max(total, 1)
        bar = "#" * filled + "." * (WIDTH - filled)
        end = "\n" if done == total else ""
        print(f"\r[{bar}] {done / 2**20:.0f} of {total / 2**20:.0f} MiB", end=end, file=sys.stderr, flush=True)
