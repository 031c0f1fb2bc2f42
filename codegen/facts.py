"""Facts about spec files that are kept between runs: their entries, and the names that entries refer to.

With them a run knows the contents of an unchanged file without parsing it, and which entries a change affects.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sageLLM.codegen.folders import origin

VOCABULARY = ("dims", "op_types", "step_inputs", "targets")
"""The kinds of entry that every op and model can refer to, or that its kernels read."""

ARCHITECTURE = re.compile(r"[A-Za-z0-9_]{1,80}\Z")
"""Valid names of an architecture in the config.json of a checkpoint."""


def claim_both(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two layouts with these `model_types`, where none means all, read the same checkpoints."""
    return not one or not other or not set(one).isdisjoint(other)


def digest(value: Any) -> str:
    """The digest of a JSON value, including the order of keys, which is that of spec entries."""
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:32]


def words_of(texts: Iterable[str]) -> set[str]:
    """The identifiers in texts."""
    return {word for text in texts for word in re.findall(r"[A-Za-z]\w*", text)}


def reached(names: Iterable[str], following: Callable[[str], Iterable[str]]) -> list[str]:
    """The names and, transitively, those that follow them, in the order found."""
    found: dict[str, None] = {}
    pending = list(names)[::-1]
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = None
            pending += list(following(name))[::-1]
    return list(found)


class Undeclared(Exception):
    """A dependency that no key covers. Only a run from scratch is then known to be right."""


@dataclass(frozen=True, slots=True)
class EntryFacts:
    """One entry: its kind (a field of RawSpecs), a digest of its data, and its names that other entries depend on."""

    kind: str
    name: str
    file: str
    digest: str
    names: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """The file in keys, which hold with and without an overlay that has the name of the package's folder."""
        return origin(self.file)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One spec file: a digest of its bytes, and its entries in order."""

    digest: str
    entries: tuple[EntryFacts, ...]

    def to_json(self) -> list[Any]:
        return [self.digest, [[one.kind, one.name, one.digest, one.names] for one in self.entries]]

    def moved(self, file: str) -> "tuple[str, FileFacts]":
        """The facts under another display name of the file, after that name."""
        return file, FileFacts(self.digest, tuple(replace(entry, file=file) for entry in self.entries))

    @classmethod
    def from_json(cls, file: str, data: list[Any]) -> "FileFacts":
        entries = (EntryFacts(kind, name, file, digest, names) for kind, name, digest, names in data[1])
        return cls(data[0], tuple(entries))


@dataclass(frozen=True)
class SpecFacts:
    """Facts of all files of a run; `base` are the files of the package if an overlay is generated."""

    files: Mapping[str, FileFacts]
    base: frozenset[str]

    def __iter__(self) -> Iterator[EntryFacts]:
        for file in self.files.values():
            yield from file.entries

    @cached_property
    def tables(self) -> Mapping[str, Mapping[str, EntryFacts]]:
        """The entries by kind and name, in spec order."""
        tables: dict[str, dict[str, EntryFacts]] = {}
        for entry in self:
            tables.setdefault(entry.kind, {})[entry.name] = entry
        return tables

    def table(self, kind: str) -> Mapping[str, EntryFacts]:
        return self.tables.get(kind, {})

    def own(self, kind: str) -> list[EntryFacts]:
        """The entries that code is generated for."""
        return [entry for entry in self.table(kind).values() if entry.file not in self.base]

    @property
    def is_overlay(self) -> bool:
        return bool(self.base)

    @property
    def first_base_file(self) -> str | None:
        """Tells in keys whether there is a base, and how its files are named."""
        return min(self.base, default=None)

    @cached_property
    def templates(self) -> str:
        """A digest of the templates of overlays."""
        return digest([[name, file.digest] for name, file in self.files.items() if name.endswith(".jinja")])

    @cached_property
    def vocabulary(self) -> str:
        """A digest of the dims, op types, step inputs and targets."""
        return self.digest_of(*VOCABULARY)

    def digest_of(self, *kinds: str) -> str:
        """A digest of all entries of some kinds."""
        return digest([[kind, one.name, one.origin, one.digest] for kind in kinds for one in self.table(kind).values()])

    @cached_property
    def repeated_names(self) -> list[str]:
        """Duplicate names of entries of one kind."""
        seen: set[tuple[str, str]] = set()
        repeated = []
        for entry in self:
            repeated += [entry.name] if (entry.kind, entry.name) in seen else []
            seen.add((entry.kind, entry.name))
        return repeated
