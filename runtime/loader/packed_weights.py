"""Makes the file of a model's weights in the form that its kernels read, or finds the one made before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.model.weights import WeightSpec
from sageLLM.runtime.executor.planner import Planner
from sageLLM.runtime.kernels.cpu.packing import DEPTH, PANEL, PackedWeight
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.loader.safetensors_reader import Checkpoint
from sageLLM.runtime.loader.weight_file import Piece, WeightFile, cache_path, read_index, write_file
from sageLLM.runtime.loader.weights import load_weights
from sageLLM.runtime.registry.plugins import Registry


def packed_file(
    model: Model,
    checkpoint: Path,
    registry: Registry,
    planner: Planner,
    graphs: Sequence[ExecutionGraph],
    folder: Path | None = None,
) -> WeightFile:
    """The file for the kernels of these graphs, in `folder` or the user's cache; written if it is absent or damaged.

    Layers are loaded, packed and written one after another. Raises CheckpointError if the file cannot be written.
    """
    gates = planner.packed_gates(model.ties, graphs)
    specs, rank, tp = model.share
    path = cache_path(folder, checkpoint, f"{PANEL} {DEPTH} {model.dtype} {rank} {tp}", specs, gates)
    found = read_index(path)
    if found is None:
        found = write_file(path, _runs(specs, model, partial(open_checkpoint, checkpoint, registry), planner, gates))
    return found


def layer_of(name: str) -> int | None:
    """The layer of a weight; None for one outside of layers."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 2 and parts[1].isdecimal() else None


def _runs(
    specs: Sequence[WeightSpec],
    model: Model,
    open_weights: Callable[[], Checkpoint],
    planner: Planner,
    gates: Mapping[str, int],
) -> Iterator[tuple[int | None, list[Piece]]]:
    """The weights of each layer, then each of the others. A weight tied to one of another run is stored again."""
    by_name = {spec.name: spec for spec in specs}
    runs: dict[int | str, list[WeightSpec]] = {}
    aliases: dict[str, list[str]] = {}
    for spec in specs:
        target = by_name[spec.tied_to or spec.name]
        layer = layer_of(spec.name)
        if target is not spec and layer == layer_of(target.name):
            aliases.setdefault(target.name, []).append(spec.name)
        else:
            key = spec.name if layer is None else layer
            runs.setdefault(key, []).append(replace(target, name=spec.name))
    packed = {name: gates.get(by_name[name].tied_to or name) for name in by_name}
    for key in sorted(runs, key=lambda key: (isinstance(key, str), key if isinstance(key, int) else 0)):
        source = open_weights()  # opened for each run: mapped pages count as memory of the process
        share = model.share
        loaded = load_weights(runs[key], source, model.dtype, torch.device("cpu"), rank=share.rank, tp=share.tp)
        source.close()
        pieces = [_piece([name, *aliases.get(name, ())], x, packed[name], planner) for name, x in loaded.items()]
        del loaded
        yield key if isinstance(key, int) else None, pieces
        del pieces


def _piece(names: list[str], weight: Tensor, gates: int | None, planner: Planner) -> Piece:
    held: Tensor | PackedWeight = weight if gates is None else planner.pack(weight, gates)
    values = held.values if isinstance(held, PackedWeight) else held.contiguous()
    data = values.reshape(-1).view(torch.uint8).numpy().data
    return Piece(names, list(weight.shape), gates, data)
