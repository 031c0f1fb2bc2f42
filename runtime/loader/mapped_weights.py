"""Weights in the form of the kernels, in a file that is mapped: later starts pack nothing, and processes share it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.executor.planner import Planner
from sageLLM.runtime.kernels.cpu.packing import PackedWeight
from sageLLM.runtime.loader.model import Model, read_weights
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.loader.weight_file import (
    DRAFT_PREFIX,
    PAGE,
    SUFFIX,
    Piece,
    StoredWeight,
    WeightFile,
    cache_path,
    read_index,
    write_file,
)
from sageLLM.runtime.registry.plugins import Registry

PACKAGE = Path(__file__).parents[2]
LIMIT, DEFAULT_LIMIT = "SAGELLM_WEIGHTS_LIMIT", 64.0
"""The variable with the GiB of all files in a folder, and its default."""
DRAFT_SECONDS = 3600.0
"""The time for which a file that is not complete may be one that is written, and not one of a killed process."""
SOURCES = ("runtime/loader/*.py", "runtime/kernels/cpu/pack*", "runtime/kernels/cpu/coded.*")
VALUES = "formats/values/*.py"
"""The code of the package, and of it and each plugin, that determines the contents of a file besides its facts."""


def place_mapped(
    model: Model,
    checkpoint: Path,
    registry: Registry,
    planner: Planner,
    graphs: Sequence[ExecutionGraph],
    folder: Path | None = None,
    *,
    keeps_codes: bool,
) -> None:
    """Fills a model without weights with those of the file, in `folder` or the user's cache; makes it if need be.

    Raises CheckpointError if the file cannot be written, and SageError for forms of weights that it cannot have.
    """
    name = planner.name
    path = _path(model, checkpoint, registry, planner, graphs, folder, keeps_codes=keeps_codes)
    found = read_index(path)
    if found is None:
        weights = _packed(model, checkpoint, registry, planner, graphs, keeps_codes=keeps_codes)
        if planner.name != name:  # without kernels, which may be there at the next start
            model.weights.update(weights)
            return
        _limit()
        found = write_file(path, _pieces(weights, model.ties), model.dequantized)
        del weights
        prune(path.parent, path)
    with suppress(OSError):
        os.utime(path)  # `prune` deletes those that have not been used for the longest time
    model.weights.update(mapped(found))
    model.dequantized.update(found.dequantized)
    planner.prepare_weights(model.weights, model.ties, graphs)  # builds the kernels


def _packed(
    model: Model,
    checkpoint: Path,
    registry: Registry,
    planner: Planner,
    graphs: Sequence[ExecutionGraph],
    *,
    keeps_codes: bool,
) -> dict[str, Weight]:
    """The weights of the checkpoint in the form of the kernels, in memory."""
    source = open_checkpoint(checkpoint, registry)
    try:
        weights, dequantized = read_weights(
            model.share, source, model.dtype, model.device, keeps_codes=keeps_codes, activations=model.activations
        )
    finally:
        source.close()
    planner.prepare_weights(weights, model.ties, graphs)
    model.dequantized.update(dequantized)
    return weights


def _path(
    model: Model,
    checkpoint: Path,
    registry: Registry,
    planner: Planner,
    graphs: Sequence[ExecutionGraph],
    folder: Path | None,
    *,
    keeps_codes: bool,
) -> Path:
    specs, rank, tp = model.share
    gates, code = planner.gates(model.ties, graphs), _code_digest(tuple(registry.packages))
    facts = f"mapped {code} {planner.name} {model.dtype} {rank} {tp} {keeps_codes} {model.activations}"
    return cache_path(folder, checkpoint, facts, specs, gates)


@lru_cache(maxsize=4)
def _code_digest(packages: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    trees = [Path(import_module(package).__file__ or "").parent for package in packages]
    found = [*(PACKAGE.glob(pattern) for pattern in SOURCES), *(tree.glob(VALUES) for tree in trees)]
    for path in (path for paths in found for path in sorted(paths)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _pieces(weights: Mapping[str, Weight], ties: Mapping[str, str]) -> Iterator[tuple[None, list[Piece]]]:
    for name, weight in weights.items():
        if name not in ties:
            names = [name, *(tied for tied, to in ties.items() if to == name)]
            yield None, [_piece(names, weight)]


def _piece(names: list[str], weight: Weight) -> Piece:
    dtype = str(weight.dtype).removeprefix("torch.")
    if isinstance(weight, PackedWeight):
        kind = dtype, weight.form, weight.activations
        return Piece(names, list(weight.shape), weight.gates, _bytes(weight.values), *kind)
    if type(weight) is not Tensor:
        raise SageError("weights_tier 'mapped' requires kernels 'auto' or 'cpu' for weights of codes; or use 'device'")
    return Piece(names, list(weight.shape), None, _bytes(weight.contiguous()), dtype)


def _bytes(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data


def mapped(file: WeightFile) -> dict[str, Weight]:
    """The weights of a file by their names in graphs. Pages are read when a step touches them."""
    # A private mapping, as torch warns of memory that is read-only; nothing writes to it, so that its pages are shared.
    memory = torch.from_numpy(np.memmap(Path(file.path), np.uint8, "c"))
    found: dict[str, Weight] = {}
    for run in file.runs:
        for stored in run.weights:
            start = run.page * PAGE + stored.start
            found |= dict.fromkeys(stored.names, _weight(stored, memory[start : start + stored.num_bytes]))
    return found


def _weight(stored: StoredWeight, values: Tensor) -> Weight:
    dtype: torch.dtype = getattr(torch, stored.dtype or "")
    if stored.gates is None:
        return values.view(dtype).view(stored.shape)
    shape = torch.Size(stored.shape)
    if stored.form is None:
        return PackedWeight(values.view(dtype), shape, stored.gates)
    return PackedWeight(values, shape, stored.gates, form=stored.form, element=dtype, activations=stored.activations)


def prune(folder: Path, kept: Path) -> None:
    """Deletes the files that have not been used for the longest time, but one, until all others fit into the limit.

    Processes that have mapped a deleted file keep it. Raises SageError for a limit that is not a number.
    """
    limit, now = _limit(), time.time()
    files = sorted(_files(folder), key=lambda one: one[1].st_mtime_ns)
    total = sum(status.st_size for _, status in files)
    for path, status in files:
        is_draft = path.name.startswith(DRAFT_PREFIX) and now - status.st_mtime < DRAFT_SECONDS
        if total > limit and path != kept and not is_draft:
            with suppress(OSError):
                path.unlink()
            total -= status.st_size


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):  # another process may delete it
            yield path, path.stat()


def _limit() -> float:
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise SageError(f"{LIMIT} must be a number of GiB of at least 0, got {text!r}")
    return limit * 2**30
