"""File of a model's weights in the form that its kernels read, with the weights of each layer in one run of pages.

    pages of the layers, then of the other weights | index as JSON | its length, u64 | MAGIC

The index lists the runs of pages with their SHA-256, and each weight with its place in its run. The name of the file
ends with a digest of everything that determines it: the checkpoint files, the layout's weights, the element type and
the packed forms. A file is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from sageLLM.runtime.core.model.weights import WeightSpec
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.kernels.cpu.cache import cache_folder

PAGE = 4096
"""Unit of positions in the file: reads that bypass the page cache must begin and end at a multiple."""
LINE = 64
CHUNK = 2**20
MAX_THREADS = 8
"""Threads that compute digests: each reads 1.5 to 2.5 GB/s."""
MAGIC = b"SAGEW001"
SUFFIX, DRAFT_PREFIX = ".weights", "draft-"


class StoredWeight(msgspec.Struct, frozen=True):
    """A weight in a run: its first byte, shape, and gates if it is packed. `names` has further names if it is tied.

    `dtype` is the type of its elements, if it is not that of the model; packed codes have a form and the type of their
    activations.
    """

    names: list[str]
    start: int
    num_bytes: int
    shape: list[int]
    gates: int | None
    dtype: str | None = None
    form: str | None = None
    activations: str | None = None


class Run(msgspec.Struct, frozen=True):
    """Consecutive pages of weights that are read together: those of one layer, or (None) of no layer."""

    layer: int | None
    page: int
    num_bytes: int
    sha256: str
    weights: list[StoredWeight]


class WeightFile(msgspec.Struct, frozen=True):
    """The index of a file. `dequantized` has the reasons for weights of codes that the file has as floats."""

    runs: list[Run]
    path: str = ""
    dequantized: dict[str, str] = {}

    @property
    def layers(self) -> dict[int, Run]:
        return {run.layer: run for run in self.runs if run.layer is not None}

    @property
    def others(self) -> list[Run]:
        """The runs of the weights outside of layers."""
        return [run for run in self.runs if run.layer is None]


class Piece(msgspec.Struct, frozen=True):
    """A weight to write: its bytes, and the fields of StoredWeight."""

    names: list[str]
    shape: list[int]
    gates: int | None
    data: memoryview
    dtype: str | None = None
    form: str | None = None
    activations: str | None = None


def cache_path(
    folder: Path | None, checkpoint: Path, facts: str, specs: Iterable[WeightSpec], gates: Mapping[str, int]
) -> Path:
    """The path of a checkpoint's file, in `folder` or the user's cache, for weights of these specs and packed gates.

    `facts` are what determines the contents besides. Raises CheckpointError if there is no folder.
    """
    texts = [facts, *map(repr, specs), *(f"{name} {count}" for name, count in sorted(gates.items()))]
    try:
        return _file_path(folder or cache_folder() / "weights", checkpoint, texts)
    except OSError as error:
        raise CheckpointError(f"cannot choose a folder for packed weights: {error}; pass weights_folder") from None


def _file_path(folder: Path, checkpoint: Path, facts: Iterable[str]) -> Path:
    digest = hashlib.sha256(MAGIC)
    files = sorted(path for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".json"))
    stats = ((path, path.stat()) for path in files)
    for fact in (*(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats), *facts):
        digest.update(fact.encode() + b"\0")
    return folder / f"{checkpoint.resolve().name}-{digest.hexdigest()[:24]}{SUFFIX}"


def write_file(
    path: Path, runs: Iterable[tuple[int | None, Sequence[Piece]]], dequantized: Mapping[str, str] | None = None
) -> WeightFile:
    """Writes the runs one after another, so that at most one is in memory; returns the index, read back.

    Raises CheckpointError without room.
    """
    draft = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=DRAFT_PREFIX, suffix=SUFFIX, delete=False) as file:
            draft = Path(file.name)
            written = [_write_run(file, layer, pieces) for layer, pieces in runs]
            index = msgspec.json.encode(WeightFile(written, dequantized=dict(dequantized or {})))
            file.write(index + len(index).to_bytes(8, "little") + MAGIC)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the weights to {path}: {error.strerror}; pass a weights_folder with enough room"
        ) from None
    finally:
        if draft is not None:
            with suppress(FileNotFoundError):
                draft.unlink()
    if (found := read_index(path)) is None:
        raise CheckpointError(f"{path} was written and cannot be read back; check the disk, or pass a weights_folder")
    return found


def _write_run(file: IO[bytes], layer: int | None, pieces: Sequence[Piece]) -> Run:
    first = file.tell()
    assert first % PAGE == 0, "a run begins with a page"
    digest = hashlib.sha256()
    weights = []
    for piece in pieces:
        start = file.tell() - first
        kind = piece.dtype, piece.form, piece.activations
        weights.append(StoredWeight(piece.names, start, piece.data.nbytes, piece.shape, piece.gates, *kind))
        padding = bytes(-piece.data.nbytes % LINE)
        for part in (piece.data, padding):
            digest.update(part)
            file.write(part)
    padding = bytes(-(file.tell() - first) % PAGE)
    digest.update(padding)
    file.write(padding)
    return Run(layer, first // PAGE, file.tell() - first, digest.hexdigest(), weights)


def read_index(path: Path) -> WeightFile | None:
    """The index of a complete file whose runs have their digests; None for a missing, cut off or damaged one."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16))
            tail = file.read(16)
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != MAGIC or length > size - 16:
                return None
            file.seek(size - 16 - length)
            found = msgspec.json.decode(file.read(length), type=WeightFile)
            with ThreadPoolExecutor(max(1, min(MAX_THREADS, os.cpu_count() or 1))) as pool:
                if all(pool.map(lambda run: _digest(file.fileno(), run) == run.sha256, found.runs)):
                    return msgspec.structs.replace(found, path=str(path))
    except (OSError, msgspec.DecodeError):
        pass
    return None


def _digest(file: int, run: Run) -> str:
    """Of the bytes of a run, through one small buffer, as the run may be larger than the memory."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK, run.num_bytes)))
    position, end = run.page * PAGE, run.page * PAGE + run.num_bytes
    while position < end:
        count = os.preadv(file, [buffer[: min(len(buffer), end - position)]], position)
        if not count:
            break
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()
