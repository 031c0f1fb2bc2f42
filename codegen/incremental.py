"""Incremental generation: links and renders only what a change of the specs can affect.

Files that are made together form a unit: those of an ops file, of a model, of all passes. The key of a unit is a digest
of everything that its emitters can read, which is enforced: they receive tables that contain nothing else. A unit is
skipped if its key and its files are those of the last run. Likewise, an op, a model or the passes are not linked again
while the key with which they were linked without findings is the same.

A finding, or a read that no key covers, ends the run; the caller then generates from scratch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any

from sageLLM.codegen.contents import Contents, EntryName, LayoutName, Row
from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.emit import (
    emit_device,
    emit_dialect_modules,
    emit_method,
    emit_model,
    emit_op_docs,
    emit_op_modules,
    emit_pass_modules,
    emit_support,
    emit_tables,
)
from sageLLM.codegen.facts import ARCHITECTURE, VOCABULARY, EntryFacts, Undeclared, claim_both, digest, reached
from sageLLM.codegen.link.interfaces import Interfaces, has_same_results, interface_digest
from sageLLM.codegen.link.linked import LinkedOps, Only
from sageLLM.codegen.load import RawSpecs
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.names import Named, clashes
from sageLLM.codegen.render import Output, Renderer
from sageLLM.codegen.spec_files import SpecFiles
from sageLLM.codegen.state import LinkRecord, State, UnitRecord

NOTHING: Only[Any] = Only({}, ())
Emit = Callable[[], list[Output]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A unit that was rendered, with its key."""

    key: str
    files: list[Output]


class Incremental:
    """One run. `units` are all units in spec order; skipped ones are the records of the last run.

    `is_intact` tells whether the files of a unit are those of the last run.
    """

    def __init__(self, files: SpecFiles, old: State, is_intact: Callable[[UnitRecord], bool]) -> None:
        self.facts, self.raw = files.facts, files.raw
        self.old, self.is_intact = old, is_intact
        self.units: dict[str, UnitRecord | Rendered] = {}
        self.links: dict[str, LinkRecord] = {}
        self.sink = Sink()
        self.vocabulary = self.raw.vocabulary()
        fused = {op.name: op.names["fuses"] for op in self.facts.table("ops").values()}
        self.ops = LinkedOps(self.raw, fused, self.sink)
        self._views: dict[str, OpDef] = {}
        self._meanings: dict[str, str] = {}
        self._interfaces: dict[str, str] = {}

    def run(self) -> None:
        """Processes all units. Raises SpecErrors or Undeclared if only a run from scratch can produce the result."""
        self._check_names()
        for name in self.ops:
            self.interface(name)
        for stem, names in self._op_files.items():
            self._op_modules(stem, names)
        for model in self.facts.table("models").values():
            self._model(model)
        self._passes()
        for device in self.facts.own("hardware"):
            key = digest([device.file, device.digest])
            self._unit(f"device {device.name}", key, partial(self._device, device.name))
        self._dialects()
        for method in self.facts.own("formats"):
            key = digest([method.file, method.digest, self.facts.is_overlay])
            self._unit(f"formats {method.name}", key, partial(self._method, method.name))
        for stem, names in self._op_files.items():
            self._op_docs(stem, names)
        key = digest([self.facts.vocabulary, self.facts.is_overlay])
        self._unit("support", key, lambda: emit_support(self._specs(), self._renderer))
        self._tables()

    @cached_property
    def outline(self) -> RawSpecs:
        """The facts about models, ops and passes that linking another one of them can read."""
        from sageLLM.codegen.spec_files import outline

        return outline(self.facts)

    @property
    def op_records(self) -> dict[str, tuple[str, str]]:
        return {name: (self.meaning(name), self.interface(name)) for name in self.ops}

    # ops

    def meaning(self, name: str) -> str:
        """A digest of everything that an op is linked from: its entry, the ops that it fuses, and the vocabulary."""
        if name not in self._meanings:
            self._meanings[name] = ""  # read by an op that fuses itself, which linking refuses
            op = self.facts.table("ops")[name]
            fused = [[callee, self._meaning_or_none(callee)] for callee in op.names["fuses"]]
            own = [self.facts.templates] if self.facts.is_overlay and not self._is_base(op) else []
            self._meanings[name] = digest([op.origin, op.digest, self.facts.vocabulary, fused, *own])
        return self._meanings[name]

    def _meaning_or_none(self, name: str) -> str | None:
        return self.meaning(name) if name in self.facts.table("ops") else None

    def interface(self, name: str) -> str:
        """A digest of the op as models and passes see it; the op is linked if no digest is known for its meaning."""
        if name not in self._interfaces:
            meaning, known = self.meaning(name), self.old.ops.get(name)
            is_known = known is not None and known[0] == meaning
            self._interfaces[name] = known[1] if known and is_known else interface_digest(self.ops[name])
        return self._interfaces[name]

    @cached_property
    def paths_of_equal_interfaces(self) -> set[str]:
        """Modules of ops with unchanged interfaces, which differ at most in docstrings and costs."""
        equal = {name for name in self.ops if self.old.ops.get(name, ("", ""))[1] == self.interface(name)}
        return {f"ops/{stem}.py" for stem, names in self._op_files.items() if equal.issuperset(names)}

    @cached_property
    def _op_files(self) -> dict[str, list[str]]:
        """The own ops by the stem of the spec file, which is also that of the generated files."""
        found: dict[str, list[str]] = {}
        for op in self.facts.own("ops"):
            found.setdefault(EntryName(op.name, op.file).stem, []).append(op.name)
        return found

    def _op_modules(self, stem: str, names: list[str]) -> None:
        reached = self._fused_by(names)
        cpu = self.facts.table("hardware").get("cpu")
        base = [name for name in reached if self._is_base(self.facts.table("ops")[name])]
        meanings = [[name, self.meaning(name)] for name in names]
        key = digest([meanings, base, self.facts.first_base_file, cpu.digest if cpu else None])
        specs = self._specs(ops=Only(self.ops, reached), hardware=Only(self.raw.hardware, ["cpu"]))
        self._unit(f"ops {stem}", key, lambda: emit_op_modules([self.ops[n] for n in names], specs, self._renderer))

    def _fused_by(self, names: Iterable[str]) -> list[str]:
        """The ops and, transitively, the ops that they fuse."""
        table = self.facts.table("ops")
        return sorted(reached(names, lambda name: [op for op in table[name].names["fuses"] if op in table]))

    def _op_docs(self, stem: str, names: list[str]) -> None:
        by_path = self._rows_by_path("model ", "passes")
        rows = [row for rows in by_path.values() for row in rows if _mentions(row, set(names))]
        key = digest([[[name, self.meaning(name)] for name in names], rows])
        specs = self._specs(ops=Only(self.ops, self._fused_by(names)))
        self._unit(f"docs {stem}", key, lambda: emit_op_docs([self.ops[name] for name in names], specs, rows))

    # models and passes

    def _model(self, model: EntryFacts) -> None:
        table = self.facts.table("models")
        names = reached([model.name], lambda name: [one for one in table[name].names["sources"] if one in table])
        words = [one.names["words"] for one in self.facts.table("passes").values()]
        entries = [[one.name, one.origin, one.digest, one.names["sources"]] for one in map(table.__getitem__, names)]
        key = digest([entries, self.facts.vocabulary, sorted({w for ws in words for w in ws})])

        def link(ops: Interfaces) -> list[Output]:
            from sageLLM.codegen.link.models import link_model

            raw = self._vocabulary_with(models=Only(self.raw.models, names), passes=self.outline.passes)
            linked = link_model(model.name, raw, ops, self.sink)
            self.sink.raise_if_any()
            if linked is None or self._is_base(model):
                return []
            return emit_model(linked, self._specs(ops=ops), self._renderer)

        self._linked_unit(f"model {model.name}", key, link)

    def _passes(self) -> None:
        models, ops = self.facts.table("models").values(), self.facts.table("ops").values()
        passes = self.facts.table("passes").values()
        key = digest(
            [
                self.facts.digest_of("passes", "pass_stages", "op_types"),
                [one.name for one in passes if self._is_packaged(one)],
                [[model.name, *(model.names[key] for key in ("extends", "config", "drops"))] for model in models],
                [[op.name, op.names["rule"]] for op in ops if op.names["rule"] is not None],
            ]
        )

        def link(ops: Interfaces) -> list[Output]:
            from sageLLM.codegen.link.passes import link_passes

            own, others = self.raw, self.outline
            raw = self._vocabulary_with(
                ops=others.ops, models=others.models, passes=own.passes, pass_stages=own.pass_stages
            )
            linked = link_passes(raw, ops, self.sink)
            self.sink.raise_if_any()
            return emit_pass_modules(self._specs(ops=ops, passes=linked), self._renderer)

        old = self.old.links.get("passes")
        if not self.facts.own("passes") and old is not None and old.key == key and self._holds(old):
            # An overlay without passes gets an empty table of passes, for which the base need not be linked.
            self.links["passes"] = old
            none = self._specs(passes=dict[str, Any]())
            self._unit("passes", digest(["no passes"]), lambda: emit_pass_modules(none, self._renderer))
            return
        self._linked_unit("passes", key, link)

    def _linked_unit(self, name: str, key: str, link: Callable[[Interfaces], list[Output]]) -> None:
        """A model or the passes: the key includes the interfaces that linking reads, as recorded by the last run."""
        old = self.old.links.get(name)
        if old is not None and old.key == key and self._holds(old):
            self.links[name] = old
            if name.startswith("model ") and self._is_base(self.facts.table("models")[name.removeprefix("model ")]):
                return
            unit = self.old.units.get(name)
            if unit is not None and unit.key == self._emission_key(old) and self.is_intact(unit):
                self.units[name] = unit
                return
        ops = Interfaces(self.ops, self._views)
        outputs = link(ops)
        if ops.is_listed:
            raise Undeclared(f"{name} depends on the names of all ops")
        reads = {op: self.interface(op) if op in self.ops else None for op in sorted(ops.names)}
        record = self.links[name] = LinkRecord(key, reads, tuple(ops.states))
        self.units[name] = Rendered(self._emission_key(record), outputs)

    def _holds(self, link: LinkRecord) -> bool:
        """Whether the ops that were read have the same interfaces, and recorded calls the same result states."""
        if any(seen != (self.interface(op) if op in self.ops else None) for op, seen in link.reads.items()):
            return False
        changed = {op for op in link.reads if op in self.ops and self.old.ops.get(op, ("",))[0] != self.meaning(op)}
        return all(has_same_results(self.ops[call[0]], call) for call in link.states if call[0] in changed)

    def _emission_key(self, link: LinkRecord) -> str:
        table = self.facts.table("ops")
        base = [op for op in link.reads if op in table and self._is_base(table[op])]
        return digest([link.key, link.reads, base, self.facts.first_base_file])

    # the rest

    def _device(self, name: str) -> list[Output]:
        return emit_device(self.raw.hardware[name], self._renderer)

    def _dialects(self) -> None:
        own = [entry.name for entry in self.facts.own("dialects")]
        key = digest([self.facts.digest_of("dialects"), own, self.facts.is_overlay])

        def link() -> list[Output]:
            from sageLLM.codegen.link.dialects import link_dialects

            raw = self._vocabulary_with(dialects=self.raw.dialects)
            dialects = link_dialects(raw, self.sink)
            self.sink.raise_if_any()
            return emit_dialect_modules(self._specs(dialects=dialects), self._renderer)

        self._unit("dialects", key, link)

    def _method(self, name: str) -> list[Output]:
        from sageLLM.codegen.link.formats import link_method

        method = link_method(self.raw.formats[name], self.sink)
        self.sink.raise_if_any()
        assert method is not None, "a format that cannot be linked is reported"
        return emit_method(method, self._renderer, is_overlay=self.facts.is_overlay)

    def _tables(self) -> None:
        names = {
            kind: tuple(EntryName(entry.name, entry.file) for entry in self.facts.own(kind))
            for kind in ("ops", "hardware", "formats")
        }
        layouts = tuple(
            LayoutName(entry.name, entry.file, tuple(entry.names["architectures"]))
            for entry in self.facts.own("models")
        )
        rows = self._rows_by_path("ops ")
        contents = Contents(self.facts.is_overlay, names["ops"], layouts, names["hardware"], names["formats"], rows)
        refs = {kind: [one.ref for one in names[kind]] for kind in names}
        key = digest([contents.is_overlay, refs, [(one.ref, one.architectures) for one in layouts], rows])
        self._unit("tables", key, lambda: emit_tables(contents, self._renderer))

    def _unit(self, name: str, key: str, emit: Emit) -> None:
        """Skips a unit with the same key and files as before, else renders it."""
        old = self.old.units.get(name)
        if old is not None and old.key == key and self.is_intact(old):
            self.units[name] = old
            return
        outputs = emit()
        self.sink.raise_if_any()
        self.units[name] = Rendered(key, outputs)

    def _rows_by_path(self, *prefixes: str) -> dict[str, tuple[Row, ...]]:
        """The rows of files of some units, in spec order."""
        units = [unit for name, unit in self.units.items() if name.startswith(prefixes)]
        return {file.path: file.rows for unit in units for file in unit.files if file.rows}

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.raw.templates)

    def _is_base(self, entry: EntryFacts) -> bool:
        return entry.file in self.facts.base

    def _is_packaged(self, entry: EntryFacts) -> bool:
        """Whether an entry belongs to the package, as its own spec or as the base of an overlay."""
        return self._is_base(entry) or not self.facts.is_overlay

    def _vocabulary_with(self, **tables: Mapping[str, Any]) -> RawSpecs:
        words = {kind: getattr(self.raw, kind) for kind in VOCABULARY}
        return RawSpecs(**words, **tables, base_files=self.facts.base, templates=self.raw.templates)

    def _specs(
        self,
        ops: Mapping[str, OpDef] = NOTHING,
        passes: Mapping[str, Any] = NOTHING,
        hardware: Mapping[str, Any] = NOTHING,
        dialects: Mapping[str, Any] = NOTHING,
    ) -> Specs:
        """Specs that contain only what an emitter declares to read."""
        return Specs(self.vocabulary, ops, NOTHING, passes, hardware, dialects, NOTHING)

    def _check_names(self) -> None:
        """Checks across files, on the facts alone: names, and the architectures of models."""
        models = [model.names for model in self.facts.table("models").values()]
        architectures = [name for names in models for name in names["architectures"]]
        if self.facts.repeated_names or any(_read_the_same(*pair) for pair in combinations(models, 2)):
            raise Undeclared("duplicate names")
        entries = [Named(one.kind, one.name, one.file, one.names) for one in self.facts]
        if any(clashes(entries, self.facts.base)):
            raise Undeclared("colliding names")
        if not all(ARCHITECTURE.match(name) for name in architectures):
            raise Undeclared("invalid name of an architecture")


def _read_the_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    is_shared = not set(one["architectures"]).isdisjoint(other["architectures"])
    return is_shared and claim_both(one["model_types"], other["model_types"])


def _mentions(row: Row, ops: set[str]) -> bool:
    return not ops.isdisjoint([row.get("op"), *row.get("consumes", ()), *row.get("produces", ())])
