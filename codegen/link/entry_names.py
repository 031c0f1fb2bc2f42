"""Reports names of entries that collide in generated code, with both places."""

from sageLLM.codegen.diagnostics import Sink, Span
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.names import Named, clashes, declared_names

KINDS = ("ops", "models", "passes", "hardware", "dialects", "formats")


def check_entry_names(raw: RawSpecs, sink: Sink) -> None:
    """Reads the names of all entries, and those that they declare."""
    entries: dict[int, Entry[object]] = {}
    named = []
    for kind in KINDS:
        for entry in getattr(raw, kind).values():
            named.append(Named(kind, entry.name, entry.doc.file, declared_names(kind, entry.spec)))
            entries[id(named[-1])] = entry
    for clash in clashes(named, raw.base_files):
        entry, other = entries[id(clash.entry)], entries[id(clash.other)] if clash.other else None
        related = (("the other one is here", _span(other, clash.other_path)),) if other else ()
        help = "rename one" if other else "rename it"
        sink.error("SAGE016", clash.message, _span(entry, clash.path), help, related)


def _span(entry: Entry[object], path: tuple[str | int, ...]) -> Span:
    """The names of rules, devices, dialects and quantisation methods are values, all others are keys."""
    is_value = path[:1] in (("rules",), ("hardware",), ("dialect",), ("method",))
    return entry.span(*path) if is_value else entry.key_span(*path)
