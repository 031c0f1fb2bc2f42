"""Digest of a checkpoint, by which engines on different hosts notice that their weights differ."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sageLLM.runtime.errors import CheckpointError

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
"""Pieces of each file that are read: reading whole files would take as long as loading them again."""
PATTERNS = ("config.json", "*.safetensors", "*.gguf")


def checkpoint_digest(path: Path) -> str:
    """Of the config, and of the length and evenly spaced pieces of each file of weights, of a folder or one file.

    Weights that differ in a small part of them may have the same digest. Raises CheckpointError.
    """
    files = sorted(one for pattern in PATTERNS for one in path.glob(pattern)) if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for one in files:
            size = one.stat().st_size
            digest.update(f"{one.suffix} {size}\n".encode())
            with one.open("rb") as file:
                for i in range(NUM_SAMPLES):
                    file.seek(max(0, size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]
