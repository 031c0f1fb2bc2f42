"""Applies the `drop` section of a layout: removes entries that are inherited or belong to used blocks."""

from collections.abc import Iterable
from typing import Any

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.link.flat_layout import FlatModel, Located
from sageLLM.codegen.link.patches import normalized
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.models import ModelFile


def drop_entries(flat: FlatModel, sink: Sink) -> None:
    """Removes config names, weights and blocks."""
    entry, spec = flat.entry, flat.entry.spec.drop
    if spec is None:
        return
    if not flat.sources:
        help = "remove `drop`, or add `extends`"
        sink.error("SAGE209", "`drop` requires `extends` or a block with `use`", entry.key_span("drop"), help)
    _drop_names(flat, flat.config, Located(spec.config, entry, ("drop", "config")), sink)
    _drop_names(flat, flat.weights, Located(spec.weights, entry, ("drop", "weights")), sink)
    for name, content in spec.blocks.items():
        if name not in flat.blocks:
            span = entry.key_span("drop", "blocks", name)
            near = did_you_mean(name, flat.blocks)
            sink.error("SAGE209", f"expected an inherited block, got '{name}'", span, near)
        elif content is None:
            del flat.blocks[name]
            flat.dropped[name] = entry.key_span("drop", "blocks", name)
        else:
            located = Located(content.weights, entry, ("drop", "blocks", name, "weights"))
            _drop_names(flat, flat.blocks[name].weights, located, sink)


def drop_checks(tables: Iterable[list[Located[str]]], entry: Entry[ModelFile], sink: Sink) -> None:
    """Removes checks, each from the tables that contain it."""
    for i, text in enumerate(entry.spec.drop.checks if entry.spec.drop else ()):
        known = [located for checks in tables for located in checks]
        if not any(normalized(located.value) == normalized(text) for located in known):
            help = f"the inherited checks: {'; '.join(located.value for located in known)}"
            message = f"expected an inherited check, got '{text}'"
            sink.error("SAGE209", message, entry.span("drop", "checks", i), help)
        for checks in tables:
            checks[:] = [located for located in checks if normalized(located.value) != normalized(text)]


def _drop_names(flat: FlatModel, table: dict[str, Any], names: Located[list[str]], sink: Sink) -> None:
    for i, name in enumerate(names.value):
        flat.dropped[name] = names.span(i)
        if table.pop(name, None) is None:
            sink.error("SAGE209", f"expected an inherited name, got '{name}'", names.span(i), did_you_mean(name, table))
