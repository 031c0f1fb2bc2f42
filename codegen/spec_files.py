"""Spec files that are parsed lazily: when an entry is read, or when no facts about the file are known."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.facts import EntryFacts, FileFacts, SpecFacts, digest, words_of
from sageLLM.codegen.folders import file_digest
from sageLLM.codegen.load import Entry, RawSpecs, SpecFile, entries_of, fused_names, load_file, source_names
from sageLLM.codegen.names import declared_names
from sageLLM.codegen.source import Document

T = TypeVar("T")


class LazyTable(Mapping[str, Entry[Any]]):
    """The entries of one kind. Reading an entry loads its file."""

    def __init__(self, facts: Mapping[str, EntryFacts], load: Callable[[EntryFacts], Entry[Any]]) -> None:
        self._facts = facts
        self._load = load

    def __getitem__(self, name: str) -> Entry[Any]:
        return self._load(self._facts[name])

    def __contains__(self, name: object) -> bool:
        return name in self._facts

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)


class SpecFiles:
    """The spec files of a run, by display name with path and digest; `known` are facts of an earlier run.

    Raises SpecErrors if a file that must be parsed does not match its schema.
    """

    def __init__(
        self,
        files: Mapping[str, tuple[Path, str]],
        base: frozenset[str],
        known: Mapping[str, FileFacts],
        templates: Mapping[str, tuple[str, Path]] = MappingProxyType({}),
    ) -> None:
        self._files = files
        self._entries: dict[str, dict[tuple[str, str], Entry[Any]]] = {}
        found: dict[str, FileFacts] = {}
        for name, (_, seen) in files.items():
            facts = known.get(name)
            found[name] = facts if facts is not None and facts.digest == seen else self._facts_of(name, seen)
        found |= {name: FileFacts(file_digest(path), ()) for name, path in templates.values()}
        self.facts = SpecFacts(found, base)
        tables = {kind: LazyTable(table, self._entry) for kind, table in self.facts.tables.items()}
        self.raw = RawSpecs(**tables, base_files=base, templates=templates)

    def _facts_of(self, name: str, seen: str) -> FileFacts:
        return FileFacts(
            seen,
            tuple(
                EntryFacts(
                    kind,
                    entry.name,
                    name,
                    digest(_data_of(entry)),
                    _names_in(kind, entry) | declared_names(kind, entry.spec),
                )
                for (kind, _), entry in self._load(name).items()
            ),
        )

    def _entry(self, facts: EntryFacts) -> Entry[Any]:
        return self._load(facts.file)[facts.kind, facts.name]

    def _load(self, name: str) -> dict[tuple[str, str], Entry[Any]]:
        if name not in self._entries:
            sink = Sink()
            file: SpecFile | None = load_file(self._files[name][0], name, sink)
            sink.raise_if_any()
            assert file is not None, "a file that cannot be used is reported"
            self._entries[name] = {(kind, entry.name): entry for kind, entry in entries_of(file)}
        return self._entries[name]


def _data_of(entry: Entry[Any]) -> Any:
    value = entry.doc.data
    for step in entry.path:
        value = value[step]
    return value


def _names_in(kind: str, entry: Entry[Any]) -> dict[str, Any]:
    """The names by which an entry depends on others, or others on it."""
    spec = entry.spec
    match kind:
        case "ops":
            return {"fuses": sorted(fused_names(entry)), "rule": spec.rule.pass_ if spec.rule else None}
        case "models":
            return {
                "extends": spec.extends,
                "sources": source_names(spec),
                "config": list(spec.config),
                "drops": spec.drop.config if spec.drop else [],
                "architectures": spec.hf.architectures,
                "model_types": spec.hf.model_types,
            }
        case "passes":
            return {"words": sorted(words_of(spec.expect))}
    return {}


def outline(facts: SpecFacts) -> RawSpecs:
    """Specs made from facts: rules of ops, config names of models, names in the expectations of passes.

    Linking a model or the passes sees other models, ops and passes only through this outline.
    """
    from sageLLM.codegen.schema.models import DropSection, ModelFile
    from sageLLM.codegen.schema.ops import OpSpec, RuleSpec
    from sageLLM.codegen.schema.passes import PassSpec

    def entry(one: EntryFacts, spec: T) -> Entry[T]:
        return Entry(one.name, spec, Document(one.file, "", {}, {}, {}, {}), ())

    def op(name: str | None) -> OpSpec:
        return OpSpec.model_construct(rule=RuleSpec.model_construct(pass_=name) if name is not None else None)

    def model(extends: str | None, config: list[str], drops: list[str]) -> ModelFile:
        drop = DropSection.model_construct(config=drops)
        return ModelFile.model_construct(extends=extends, config=dict.fromkeys(config), drop=drop)

    ops, models, passes = (facts.table(kind).values() for kind in ("ops", "models", "passes"))
    words = " ".join(sorted({word for one in passes for word in one.names["words"]}))
    return RawSpecs(
        ops={one.name: entry(one, op(one.names["rule"])) for one in ops},
        models={
            one.name: entry(one, model(*(one.names[key] for key in ("extends", "config", "drops")))) for one in models
        },
        passes={one.name: entry(one, PassSpec.model_construct(expect={words: []})) for one in passes},
        base_files=facts.base,
    )
