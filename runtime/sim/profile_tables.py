"""Tables of measured times with linear interpolation, and their csv readers."""

import csv
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.sim.trace import TraceError

Table = npt.NDArray[np.float64]
Point = tuple[float, ...]


class Grid:
    """Values over a full grid of points, with multilinear interpolation and extrapolation."""

    def __init__(self, axes: Sequence[Sequence[float]], values: Table) -> None:
        self._axes = [list(axis) for axis in axes]
        self._values = values

    def at(self, *point: float) -> float:
        """The value at a point, at least 0."""
        values = self._values
        for axis, x in zip(self._axes, point, strict=True):
            i, share = cell(axis, x)
            values = values[i] + share * (values[i + 1] - values[i])
        return max(float(values), 0.0)


class Rows:
    """Values over a first axis, with a second axis for each of its points, interpolated along both.

    Unlike a `Grid` the second axes may differ: a table of experts has no row for more experts than the tokens select.
    """

    def __init__(self, rows: Mapping[float, Grid]) -> None:
        self._axis = sorted(rows)
        self._rows = [rows[x] for x in self._axis]

    def at(self, x: float, y: float) -> float:
        """The value at (x, y), at least 0."""
        i, share = cell(self._axis, x)
        low, high = self._rows[i].at(y), self._rows[i + 1].at(y)
        return max(low + share * (high - low), 0.0)


def cell(axis: Sequence[float], x: float) -> tuple[int, float]:
    """The cell of an axis for x, and the position in it; the outermost cell extrapolates beyond the axis."""
    i = min(max(bisect_left(axis, x) - 1, 0), len(axis) - 2)
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])


def grid(times: Mapping[Point, float], path: Path) -> Grid:
    """The grid of these points. Raises TraceError if a point is missing."""
    if len(times) < 2:
        raise TraceError(f"{path}: expected at least two grid points, got {len(times)}")
    axes = [sorted({point[i] for point in times}) for i in range(len(next(iter(times))))]
    shape = [len(axis) for axis in axes]
    try:
        values = np.array([times[point] for point in _product(axes)])
    except KeyError as error:
        raise TraceError(f"{path}: expected a full grid, got none at the point {error}") from None
    return Grid(axes, values.reshape(shape))


def _product(axes: Sequence[Sequence[float]]) -> Iterable[Point]:
    mesh = np.meshgrid(*axes, indexing="ij")
    return list(zip(*(axis.ravel().tolist() for axis in mesh), strict=True))


def table_path(folder: Path, name: str) -> Path:
    """The file of a table: `NAME.csv` in a profile, `profile_NAME.csv` next to a serving timeline."""
    beside_timeline = folder / f"profile_{name}.csv"
    return beside_timeline if beside_timeline.exists() else folder / f"{name}.csv"


def read_lines(path: Path, axis: str) -> dict[str, Grid]:
    """A one-dimensional grid of times per layer name: the columns layer, `axis`, time_us."""
    times: dict[str, dict[Point, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                times.setdefault(row["layer"], {})[float(row[axis]),] = float(row["time_us"])
            except KeyError as error:
                raise TraceError(f"{path}:1: expected a column {error}") from None
            except (ValueError, TypeError) as error:
                raise TraceError(f"{path}:{line}: {error}") from None
    return {layer: grid(points, path) for layer, points in times.items()}


def read_numbers(path: Path) -> list[Point]:
    """The rows of a table of numbers, without its header."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        next(lines, None)
        try:
            return [tuple(map(float, line)) for line in lines]
        except ValueError as error:
            raise TraceError(f"{path}:{lines.line_num}: {error}") from None


def read_rows(path: Path) -> Rows:
    """A table of (x, y, time), with at least two x and at least two y for all but one of them."""
    rows: dict[float, dict[Point, float]] = {}
    for x, y, time in read_numbers(path):
        rows.setdefault(x, {})[y,] = time
    # A single point is no line: the row of one token, which selects one number of experts.
    lines = {x: grid(points, path) for x, points in rows.items() if len(points) > 1}
    if len(lines) < 2:
        raise TraceError(f"{path}: expected at least two rows of at least two points, got {len(lines)}")
    return Rows(lines)
