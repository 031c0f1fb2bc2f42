"""Predicts step durations from op latencies measured on a device, layer by layer.

The tables are those of LLMServingSim's profiler (casys-kaist/LLMServingSim, MIT): dense ops by the tokens of the step,
ops per sequence, and attention by the tokens of a prompt chunk, its context, the number of decodes and the context of
each. Times are linearly interpolated between the points of a table and extrapolated beyond them.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepWork
from sageLLM.runtime.sim.trace import TraceError

Table = npt.NDArray[np.float64]
PER_STEP = ("embedding", "final_layernorm")
TWICE_PER_LAYER = "layernorm"


class Grid:
    """Values over a full grid of points, with multilinear interpolation and extrapolation."""

    def __init__(self, axes: Sequence[Sequence[float]], values: Table) -> None:
        self._axes = [list(axis) for axis in axes]
        self._values = values

    def at(self, *point: float) -> float:
        """The value at a point, at least 0."""
        values = self._values
        for axis, x in zip(self._axes, point, strict=True):
            # The cell of x, or the outermost one for a point beyond the grid, which extrapolates it.
            i = min(max(int(np.searchsorted(axis, x)) - 1, 0), len(axis) - 2)
            share = (x - axis[i]) / (axis[i + 1] - axis[i])
            values = values[i] + share * (values[i + 1] - values[i])
        return max(float(values), 0.0)


class LayerProfileCost:
    """The duration of a step of a model with `num_layers` layers.

    `request_s` is the time per request besides the ops, such as the scheduler's where the device waits for it. The
    tables have at most one prompt chunk per step, so of several chunks the largest is looked up together with the
    decodes, and the others alone. Raises TraceError if the tables are incomplete.
    """

    def __init__(self, folder: Path, num_layers: int, request_s: float = 0.0) -> None:
        dense = _read_lines(folder / "profile_dense.csv", "tokens")
        per_sequence = _read_lines(folder / "profile_per_sequence.csv", "sequences")
        missing = sorted({*PER_STEP, TWICE_PER_LAYER} - dense.keys())
        if missing:
            raise TraceError(f"{folder / 'profile_dense.csv'}: expected rows for {', '.join(missing)}, got none")
        self._num_layers = num_layers
        self._request_s = request_s
        self._step = [dense[layer] for layer in PER_STEP]
        self._layer = [grid for layer, grid in dense.items() if layer not in PER_STEP]
        self._layer.append(dense[TWICE_PER_LAYER])
        self._sequence = list(per_sequence.values())
        self._attention = _Attention(folder / "profile_attention.csv")

    def step_s(self, work: StepWork) -> float:
        """The seconds of a step with this work; 0 for no work."""
        num_tokens = work.num_tokens
        if not num_tokens:
            return 0.0
        num_sequences = work.num_decodes + len(work.prefill)
        layer_us = sum(grid.at(num_tokens) for grid in self._layer) + self._attention.layer_us(work)
        once_us = sum(grid.at(num_tokens) for grid in self._step) + sum(g.at(num_sequences) for g in self._sequence)
        return (layer_us * self._num_layers + once_us) / 1e6 + self._request_s * num_sequences


class _Attention:
    """Attention latencies of one layer: decodes alone, a chunk alone, and a chunk together with decodes."""

    def __init__(self, path: Path) -> None:
        numbers = ((tuple(point), time) for *point, time in _read_numbers(path))
        rows = {point: time for point, time in numbers if all(map(_is_zero_or_power_of_2, point))}
        self._decodes = _grid({(n, d): t for (c, k, n, d), t in rows.items() if not c}, path)
        self._chunk = _grid({(c, k): t for (c, k, n, d), t in rows.items() if not n}, path)
        self._both = _grid({point: t for point, t in rows.items() if point[0] and point[2]}, path)

    def layer_us(self, work: StepWork) -> float:
        """The microseconds of attention in one layer of the step."""
        chunks = sorted(work.prefill, key=lambda chunk: chunk.num_tokens)
        largest = chunks.pop() if chunks else None
        return self._largest_us(largest, work) + sum(self._chunk.at(n, start) for start, n in chunks)

    def _largest_us(self, chunk: PromptChunk | None, work: StepWork) -> float:
        if not work.num_decodes:
            return self._chunk.at(chunk.num_tokens, chunk.start) if chunk else 0.0
        mean_context = work.num_context_tokens / work.num_decodes
        if chunk is None:
            return self._decodes.at(work.num_decodes, mean_context)
        return self._both.at(chunk.num_tokens, chunk.start, work.num_decodes, mean_context)


def _is_zero_or_power_of_2(value: float) -> bool:
    """Whether a value is 0 or a power of two: at these values the profiler's grid is complete."""
    return int(value) & (int(value) - 1) == 0


def _grid(times: Mapping[tuple[float, ...], float], path: Path) -> Grid:
    if len(times) < 2:
        raise TraceError(f"{path}: expected at least two grid points, got {len(times)}")
    axes = [sorted({point[i] for point in times}) for i in range(len(next(iter(times))))]
    shape = [len(axis) for axis in axes]
    try:
        values = np.array([times[point] for point in _product(axes)])
    except KeyError as error:
        raise TraceError(f"{path}: expected a full grid, got none at the point {error}") from None
    return Grid(axes, values.reshape(shape))


def _product(axes: Sequence[Sequence[float]]) -> Iterable[tuple[float, ...]]:
    mesh = np.meshgrid(*axes, indexing="ij")
    return list(zip(*(axis.ravel().tolist() for axis in mesh), strict=True))


def _read_lines(path: Path, axis: str) -> dict[str, Grid]:
    """A one-dimensional grid of times per layer name."""
    times: dict[str, dict[tuple[float, ...], float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                times.setdefault(row["layer"], {})[float(row[axis]),] = float(row["time_us"])
            except (KeyError, ValueError, TypeError) as error:
                raise TraceError(f"{path}:{line}: {error}") from None
    return {layer: _grid(points, path) for layer, points in times.items()}


def _read_numbers(path: Path) -> list[tuple[float, ...]]:
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        next(lines, None)
        try:
            return [tuple(map(float, line)) for line in lines]
        except ValueError as error:
            raise TraceError(f"{path}:{lines.line_num}: {error}") from None
