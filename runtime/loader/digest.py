"""Digest of a checkpoint, by which engines on different hosts notice that their weights differ."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.checkpoint_index import INDEX_FILE, SINGLE_FILE, has_single_file, weight_map
from sageLLM.runtime.loader.gguf_folder import WEIGHTS

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
"""Pieces of each file that are read: reading whole files would take as long as loading them again."""


def checkpoint_digest(path: Path) -> str:
    """Of the config and the weights of a folder, or of a GGUF file. Raises CheckpointError."""
    return files_digest([path / "config.json", *weight_files(path)] if path.is_dir() else [path])


def weights_digest(folder: Path) -> str:
    """Of the weights that are read from a folder. Raises CheckpointError."""
    return files_digest(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that are read from a folder. Raises CheckpointError."""
    if has_single_file(folder):
        return [folder / SINGLE_FILE]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted({*weight_map(folder / INDEX_FILE).values()})]


def files_digest(files: list[Path]) -> str:
    """Of the length and evenly spaced pieces of each file; files that differ in a small part may have the same one.

    Raises CheckpointError.
    """
    digest = hashlib.sha256()
    for one in files:
        try:
            size = one.stat().st_size
            digest.update(f"{size}\n".encode())
            with one.open("rb") as file:
                for i in range(NUM_SAMPLES):
                    file.seek(max(0, size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        except OSError as error:
            raise CheckpointError(f"{one} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]
