"""`sagellm cache`: the sizes of the parts of the user's cache, and their deletion."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from sageLLM.runtime.kernels.cpu.cache import cache_folder

PartName: TypeAlias = Literal["kernels", "weights", "gguf"]
PATTERNS: dict[PartName, str] = {"kernels": "*.so", "weights": "*.weights", "gguf": "*"}
"""The entries of each folder. All are made again when they are needed; a process keeps what it has opened."""


@dataclass(frozen=True, slots=True)
class Part:
    """The entries of one folder of the cache."""

    name: PartName
    paths: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of files, without those that links point to."""
        files = [file for path in self.paths for file in (path, *(path.rglob("*") if path.is_dir() else ()))]
        return sum(file.lstat().st_size for file in files if not file.is_dir())

    def clear(self) -> None:
        """Deletes the entries. Raises OSError for one that cannot be deleted."""
        for path in self.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                with suppress(FileNotFoundError):  # another process may delete it
                    path.unlink()


def show_cache(clear: PartName | Literal["all"] | None, *, as_json: bool) -> int:
    """Clears a part or all, then prints the sizes of all; returns the exit code."""
    try:
        folder = cache_folder()
        for part in parts_of(folder):
            if clear in (part.name, "all"):
                part.clear()
        parts = parts_of(folder)
        sizes = [part.num_bytes for part in parts]
    except OSError as error:
        remedy = "set SAGELLM_CACHE_DIR to a folder of yours"
        print(f"error: cannot read or clear the cache: {error}; {remedy}", file=sys.stderr)
        return 1
    if as_json:
        rows = [
            {"part": part.name, "entries": len(part.paths), "bytes": size}
            for part, size in zip(parts, sizes, strict=True)
        ]
        print(json.dumps({"folder": str(folder), "parts": rows}))
        return 0
    print(folder)
    for part, size in zip(parts, sizes, strict=True):
        print(f"{part.name:<8} {len(part.paths):>6} entries {size / 2**20:>10.1f} MiB")
    return 0


def parts_of(folder: Path) -> list[Part]:
    return [Part(name, tuple(sorted((folder / name).glob(pattern)))) for name, pattern in PATTERNS.items()]
