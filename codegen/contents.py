"""Contents of a generated tree that its tables are made of: names in spec order, and rows of its modules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

Row = Mapping[str, Any]
"""One line of a table, as JSON values, so that it can be kept between runs."""


@dataclass(frozen=True, slots=True)
class EntryName:
    """The name of a spec entry, and the file that defines it."""

    name: str
    file: str

    @property
    def ref(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def stem(self) -> str:
        """The spec file's stem, which names the generated files."""
        return PurePosixPath(self.file).stem

    @property
    def class_name(self) -> str:
        return class_name(self.name)


@dataclass(frozen=True, slots=True)
class LayoutName(EntryName):
    """A layout, with the architectures of the checkpoints that it reads."""

    architectures: tuple[str, ...]

    @property
    def constant(self) -> str:
        """The name of the layout in its module."""
        return self.name.upper()


@dataclass(frozen=True, slots=True)
class Contents:
    """The entries of a generated tree, and the rows of its files by path."""

    is_overlay: bool
    ops: tuple[EntryName, ...]
    models: tuple[LayoutName, ...]
    devices: tuple[EntryName, ...]
    formats: tuple[EntryName, ...]
    rows: Mapping[str, tuple[Row, ...]]

    @property
    def ops_by_stem(self) -> dict[str, list[EntryName]]:
        found: dict[str, list[EntryName]] = {}
        for op in self.ops:
            found.setdefault(op.stem, []).append(op)
        return found

    def rows_by_stem(self, path: str) -> dict[str, tuple[Row, ...]]:
        """The rows of the files `path` by stem (`tests/test_{}.py`), for stems with rows."""
        found = {stem: self.rows.get(path.format(stem), ()) for stem in self.ops_by_stem}
        return {stem: rows for stem, rows in found.items() if rows}


def class_name(name: str) -> str:
    """`fused_add_rms_norm` -> `FusedAddRmsNorm`."""
    return "".join(part.capitalize() for part in name.split("_"))


def refs(rows: Iterable[Row]) -> tuple[str, ...]:
    """The entries that rows come from."""
    return tuple(row["ref"] for row in rows)
