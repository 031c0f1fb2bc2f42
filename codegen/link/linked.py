"""Ops that are linked on first use, and views that expose only declared entries.

Entries that a view hides cannot influence a result, so a digest of the exposed ones tells whether the result is valid.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sageLLM.codegen.diagnostics import Sink, SpecErrors
from sageLLM.codegen.facts import Undeclared
from sageLLM.codegen.link.ops import link_op
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.schema.ops import OpSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Only(Mapping[str, T]):
    """The declared part of a table. Reading another name raises Undeclared."""

    table: Mapping[str, T]
    names: Collection[str]

    def __getitem__(self, name: str) -> T:
        if name not in self.names:
            raise Undeclared(f"undeclared read of '{name}'")
        return self.table[name]

    def __contains__(self, name: object) -> bool:
        if name not in self.names:
            raise Undeclared(f"undeclared lookup of '{name}'")
        return name in self.table

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.table if name in self.names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class LinkedOps(Mapping[str, OpDef]):
    """The ops, each linked on first use. A finding ends the run, which then starts again from scratch."""

    def __init__(self, raw: RawSpecs, callees: Mapping[str, Collection[str]], sink: Sink) -> None:
        self._raw = raw
        self._vocabulary = raw.vocabulary()
        self._callees = callees
        self._sink = sink
        self.linked: dict[str, OpDef] = {}
        self._pending: set[str] = set()

    def __getitem__(self, name: str) -> OpDef:
        if name not in self.linked:
            self.linked[name] = self._link(name, self._raw.ops[name])
        return self.linked[name]

    def _link(self, name: str, entry: Entry[OpSpec]) -> OpDef:
        if name in self._pending:
            raise Undeclared(f"'{name}' fuses itself")
        self._pending.add(name)
        op = link_op(entry, self._vocabulary, Only(self, self._callees[name]), self._sink)
        self._pending.discard(name)
        if op is None:
            raise SpecErrors(self._sink.diagnostics)
        return op

    def __contains__(self, name: object) -> bool:
        return name in self._raw.ops

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw.ops)

    def __len__(self) -> int:
        return len(self._raw.ops)
