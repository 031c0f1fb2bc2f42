"""Weights that stay on disk: each step reads those of one layer while the layer before computes.

A small number of staging buffers hold the layers in turn. The weights outside of layers stay in memory, and so do as
many layers as the budget allows. A table of which steps gather single rows is mapped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.execution_graph.weight_loads import FILE, StreamedLayer, staging_name, stream_weights
from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.kernels.cpu.packing import PackedWeight, WeightMemory
from sageLLM.runtime.loader.weight_file import PAGE, Run, StoredWeight, WeightFile

NUM_BUFFERS = 2
"""One for the layer that computes, and one for the layer that is read."""


class WeightStream:
    """The weights of a file: `weights` by their names in graphs, of which those of streamed layers are valid only in a
    plan of a graph from `streamed`, next to `tensors`, the inputs of its loads."""

    def __init__(
        self,
        file: WeightFile,
        dtype: torch.dtype,
        *,
        budget: int | None = None,
        gathered: frozenset[str] = frozenset(),
        is_direct: bool | None = None,
    ) -> None:
        """`budget` is the memory for weights in bytes; by default only one layer more than computes is in memory.

        `gathered` names the tables of which steps read single rows. `is_direct` reads around the page cache, by default
        if the file does not fit in the free memory. Raises SageError for a budget that is too small.
        """
        self._dtype = dtype
        mapped = [run for run in file.others if gathered.issuperset(run.weights[0].names)]
        kept = [run for run in file.others if run not in mapped]
        layers = file.layers
        chosen = choose_streamed({i: run.num_bytes for i, run in layers.items()}, kept, budget)
        self.num_layers, self.num_streamed = len(layers), len(chosen)
        self.staging_bytes = max((layers[i].num_bytes for i in chosen), default=0)
        kept += [run for i, run in layers.items() if i not in chosen]
        self.kept_bytes = sum(run.num_bytes for run in kept)
        self._file = os.open(file.path, os.O_RDONLY)
        self.weights: dict[str, Weight] = {}
        for run in kept:
            self._add(run, self._read(run))
        for run in mapped:
            self._add(run, _mapped(file.path, run))
        self.tensors: dict[str, Tensor] = {}
        self._layers: dict[int, StreamedLayer] = {}
        if chosen:
            self._stage([layers[i] for i in chosen])
            self._open_for_steps(file.path, is_direct)

    def _stage(self, runs: Sequence[Run]) -> None:
        buffers = [
            WeightMemory(reserve=0).take(self.staging_bytes, torch.int8) for _ in range(min(NUM_BUFFERS, len(runs)))
        ]
        for i, run in enumerate(runs):
            assert run.layer is not None, "only layers are streamed"
            buffer = i % len(buffers)
            part = buffers[buffer][: run.num_bytes]
            self._layers[run.layer] = StreamedLayer(run.page, run.num_bytes, buffer)
            self.tensors[staging_name(run.layer)] = part
            self._add(run, part, is_staged=True)

    def _open_for_steps(self, path: str, is_direct: bool | None) -> None:
        size = os.fstat(self._file).st_size
        self.is_direct = size > _available_memory() if is_direct is None else is_direct
        if self.is_direct and hasattr(os, "O_DIRECT"):
            try:
                direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:  # a file system without direct reads, such as tmpfs
                self.is_direct = False
            else:
                os.close(self._file)
                self._file = direct
        self.tensors[FILE] = torch.tensor([self._file])

    def __del__(self) -> None:
        if (file := getattr(self, "_file", None)) is not None:
            os.close(file)

    def __str__(self) -> str:
        buffers = f"{min(NUM_BUFFERS, self.num_streamed)} buffers of {self.staging_bytes / 2**20:.1f} MiB"
        where = f"{self.num_streamed} of {self.num_layers} layers are read from disk in each step, through {buffers}"
        return f"weights: {where}; {self.kept_bytes / 2**20:.1f} MiB stay in memory"

    def streamed(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The graph with the loads of streamed layers."""
        if not self._layers:
            return graph
        distance = -(-self.num_layers // self.num_streamed)
        budget = NUM_BUFFERS * self.staging_bytes
        return stream_weights(graph, self._layers, prefetch_layers=distance, budget_bytes=budget)

    def _read(self, run: Run) -> Tensor:
        buffer = WeightMemory(reserve=0).take(run.num_bytes, torch.int8)
        view, position = buffer.numpy().data.cast("B"), run.page * PAGE
        while view:
            count = os.preadv(self._file, [view], position)
            assert count, "the length of the file was checked when it was opened"
            view, position = view[count:], position + count
        return buffer

    def _add(self, run: Run, memory: Tensor, *, is_staged: bool = False) -> None:
        for stored in run.weights:
            self.weights |= dict.fromkeys(stored.names, self._weight(stored, memory, is_staged))

    def _weight(self, stored: StoredWeight, memory: Tensor, is_staged: bool) -> Weight:
        values = memory[stored.start : stored.start + stored.num_bytes].view(self._dtype)
        if stored.gates is None:
            return values.view(stored.shape)
        return PackedWeight(values, torch.Size(stored.shape), stored.gates, is_staged)


def choose_streamed(layer_bytes: Mapping[int, int], kept: Sequence[Run], budget: int | None) -> list[int]:
    """The layers to read in each step: as few as the budget allows, spread evenly, so that each load has the time of
    the layers before it. Raises SageError if not even the staging buffers fit."""
    layers, largest = list(layer_bytes), max(layer_bytes.values(), default=0)
    fixed = sum(run.num_bytes for run in kept)
    if budget is None:
        return layers
    if fixed + sum(layer_bytes.values()) <= budget:
        return []
    least = fixed + min(NUM_BUFFERS, len(layers)) * largest
    if budget < least:
        raise SageError(
            f"weights_budget must be at least {least / 2**30:.3f} GiB, the weights outside of layers and {NUM_BUFFERS} "
            f"layers, got {budget / 2**30:.3f}"
        )
    num_streamed = min(len(layers), max(NUM_BUFFERS, len(layers) - (budget - least) // largest))
    return [layers[(i + 1) * len(layers) // num_streamed - 1] for i in range(num_streamed)]


def gathered_tables(graphs: Sequence[ExecutionGraph], ties: Mapping[str, str]) -> frozenset[str]:
    """The weights of which all graphs only gather rows, without those that are tied to others."""
    kinds: MutableMapping[str, set[str]] = {}
    for graph in graphs:
        for node in graph.nodes.values():
            for ref in node.inputs:
                if ref.name in graph.weights:
                    kinds.setdefault(ref.name, set()).add(node.op_type.name)
    tied = {*ties, *ties.values()}
    return frozenset(name for name, found in kinds.items() if found == {"EMBEDDING"} and name not in tied)


def _mapped(path: str, run: Run) -> Tensor:
    """The bytes of a run, mapped: pages are read when a step touches them, and the system can drop them."""
    # A private mapping, as torch warns of memory that is read-only; nothing writes to it.
    return torch.from_numpy(np.memmap(Path(path), np.int8, "c", run.page * PAGE, (run.num_bytes,)))


def _available_memory() -> int:
    """The bytes that can be allocated without swapping; those of the machine where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
