"""The table of layouts in generated code, which imports the module of a layout when the layout is first read."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import NamedTuple

from sageLLM.runtime.core.model.layout import ModelLayout


class LayoutEntry(NamedTuple):
    """The module of a layout, the layout's name there, and the architectures of the checkpoints that it reads."""

    module: str
    constant: str
    architectures: tuple[str, ...]


class LayoutTable(Mapping[str, ModelLayout]):
    """Layouts by name. Names and architectures are known without importing a layout."""

    def __init__(self, entries: Mapping[str, LayoutEntry]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> ModelLayout:
        entry = self._entries[name]
        layout: ModelLayout = getattr(import_module(entry.module), entry.constant)
        return layout

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __or__(self, other: "LayoutTable") -> "LayoutTable":
        return LayoutTable({**self._entries, **other._entries})

    @property
    def architectures(self) -> set[str]:
        """The architectures that any layout reads."""
        return {name for entry in self._entries.values() for name in entry.architectures}

    def readers_of(self, architecture: str) -> list[ModelLayout]:
        """The layouts that read checkpoints of this architecture, in the order of the table."""
        return [self[name] for name, entry in self._entries.items() if architecture in entry.architectures]
