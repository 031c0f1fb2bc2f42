"""Progress bar of commands that write checkpoints, on a terminal."""

import sys

WIDTH = 30
"""Characters of the bar."""


def show_progress(done: int, total: int) -> None:
    """Prints the bytes that are done to stderr, if it is a terminal."""
    if sys.stderr.isatty():
        filled = WIDTH * done // max(total, 1)
        bar = "#" * filled + "." * (WIDTH - filled)
        end = "\n" if done == total else ""
        print(f"\r[{bar}] {done / 2**20:.0f} of {total / 2**20:.0f} MiB", end=end, file=sys.stderr, flush=True)
