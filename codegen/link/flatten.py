"""Flattens a layout that extends another one: merges the sections and applies drops and patches."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.link.flat_layout import (
    FlatBlock,
    FlatModel,
    FlatRepeat,
    Located,
    T,
    YamlPath,
    flat_line,
    flat_lines,
)
from sageLLM.codegen.link.patches import apply_patch, normalized
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.models import BlockSpec, ConfigField, ModelFile, RepeatSpec


def flatten(entry: Entry[ModelFile], models: Mapping[str, Entry[ModelFile]], sink: Sink) -> FlatModel | None:
    """The complete layout, or None if its base cannot be used."""
    name = entry.spec.extends
    if name is None:
        flat = FlatModel(entry, None)
        _merge(flat, entry, sink)
        return flat
    base = models.get(name)
    if base is None:
        others = [model for model in models if model != entry.name]
        sink.error("SAGE201", f"unknown layout '{name}'", entry.span("extends"), did_you_mean(name, others))
        return None
    if base.spec.extends is not None:
        help = f"extend '{base.spec.extends}' directly" if base.name != entry.name else "name another layout"
        message = f"the base layout must not extend another one, but '{name}' extends '{base.spec.extends}'"
        sink.error("SAGE201", message, entry.span("extends"), help)
        return None
    flat = FlatModel(entry, base)
    _merge(flat, base, sink)
    _drop(flat, entry, sink)
    _merge(flat, entry, sink)
    return flat


def _drop(flat: FlatModel, entry: Entry[ModelFile], sink: Sink) -> None:
    """Removes the inherited entries listed under `drop`."""
    spec = entry.spec.drop
    if spec is None:
        return
    for section, names, table in (("config", spec.config, flat.config), ("weights", spec.weights, flat.weights)):
        _drop_names(table, Located(names, entry, ("drop", section)), sink)
    for block, content in spec.blocks.items():
        if block not in flat.blocks:
            help = did_you_mean(block, flat.blocks)
            span = entry.key_span("drop", "blocks", block)
            sink.error("SAGE209", f"expected an inherited block, got '{block}'", span, help)
        elif content is None:
            del flat.blocks[block]
        else:
            located = Located(content.weights, entry, ("drop", "blocks", block, "weights"))
            _drop_names(flat.blocks[block].weights, located, sink)
    for i, text in enumerate(spec.checks):
        found = [located for located in flat.checks if normalized(located.value) == normalized(text)]
        if not found:
            help = f"the inherited checks: {'; '.join(located.value for located in flat.checks)}"
            message = f"expected an inherited check, got '{text}'"
            sink.error("SAGE209", message, entry.span("drop", "checks", i), help)
        flat.checks = [located for located in flat.checks if located not in found]


def _drop_names(table: dict[str, Any], names: Located[list[str]], sink: Sink) -> None:
    for i, name in enumerate(names.value):
        if table.pop(name, None) is None:
            sink.error("SAGE209", f"expected an inherited name, got '{name}'", names.span(i), did_you_mean(name, table))


def _merge(flat: FlatModel, entry: Entry[ModelFile], sink: Sink) -> None:
    """Merges a file into the layout: mappings, checks and ignored names are extended, the rest is replaced."""
    spec = entry.spec
    if flat.base is None and spec.drop is not None:
        sink.error("SAGE209", "`drop` requires `extends`", entry.key_span("drop"), "remove `drop`, or add `extends`")
    flat.config = _joined_config(flat.config, spec.config, entry)
    _locate_all(flat.weights, spec.weights, entry, ("weights",))
    flat.checks += _located_list(spec.checks, entry, ("checks",))
    flat.ignore += _located_list(spec.ignore_hf, entry, ("ignore_hf",))
    flat.tiny |= spec.tests.tiny
    for phase, ops in spec.phases.items():
        flat.phases.update((phase, Located(op, entry, ("phases", phase, form))) for form, op in ops.items())
    if "rope" in spec.model_fields_set:
        flat.rope = Located(spec.rope, entry, ("rope",)) if spec.rope is not None else None
    if spec.alibi is not None:
        flat.alibi = Located(spec.alibi, entry, ("alibi",))
    if spec.cache is not None:
        flat.cache = Located(spec.cache, entry, ("cache",))
    if spec.tp is not None:
        flat.divides = _located_list(spec.tp.divides, entry, ("tp", "divides"))
    if spec.program is not None:
        flat.program = [
            FlatRepeat(Located(item, entry, ("program", i)), flat_lines(item.do, entry, ("program", i, "do")))
            if isinstance(item, RepeatSpec)
            else flat_line(item, entry, ("program", i))
            for i, item in enumerate(spec.program)
        ]
        flat.hidden = None  # it named a value of the replaced program
    if spec.hidden is not None:
        flat.hidden = Located(spec.hidden, entry, ("hidden",))
    if spec.returns is not None:
        flat.returns = _located_list(spec.returns, entry, ("returns",))
    for name, block in spec.blocks.items():
        _merge_block(flat, name, Located(block, entry, ("blocks", name)), sink)
    for patch in _located_list(spec.patch, entry, ("patch",)):
        apply_patch(patch, flat.program, sink)


def _merge_block(flat: FlatModel, name: str, located: Located[BlockSpec], sink: Sink) -> None:
    spec, entry, path = located.value, located.entry, located.path
    block = flat.blocks.setdefault(name, FlatBlock(located))
    block.located = located
    block.summary = spec.summary or block.summary
    if spec.op_type is not None:
        declared = spec.op_type
        op_type = declared if isinstance(declared, str) else {str(phase): name for phase, name in declared.items()}
        block.op_type = Located(op_type, entry, (*path, "op_type"))
    if spec.hf is not None:
        block.hf = Located(spec.hf, entry, (*path, "hf"))
    _locate_all(block.weights, spec.weights, entry, (*path, "weights"))
    if spec.args is not None:
        block.args = {arg: Located(type_, entry, (*path, "args", arg)) for arg, type_ in spec.args.items()}
    if spec.body is not None:
        block.body = flat_lines(spec.body, entry, (*path, "body"))
    if spec.returns is not None:
        block.returns = _located_list(spec.returns, entry, (*path, "returns"))
    for patch in _located_list(spec.patch, entry, (*path, "patch")):
        apply_patch(patch, block.body, sink)


def _locate_all(table: dict[str, Located[T]], items: Mapping[str, T], entry: Entry[ModelFile], path: YamlPath) -> None:
    for name, value in items.items():
        table[name] = Located(value, entry, (*path, name))


def _joined_config(
    known: Mapping[str, Located[ConfigField]], own: Mapping[str, ConfigField], entry: Entry[ModelFile]
) -> dict[str, Located[ConfigField]]:
    """The config in definition order: inherited names keep their position; new names come last, or just before the
    first redefined name that reads them, because an expression may only read earlier names."""
    joined: dict[str, Located[ConfigField]] = {}
    pending = {name: field_ for name, field_ in own.items() if name not in known}

    def add(name: str, field_: ConfigField) -> None:
        for word in re.findall(r"[A-Za-z]\w*", f"{field_.value} {field_.default} {field_.if_null}"):
            if word in pending:
                add(word, pending.pop(word))
        joined[name] = Located(field_, entry, ("config", name))

    for name, inherited in known.items():
        if name in own:
            add(name, own[name])
        else:
            joined[name] = inherited
    while pending:
        name = next(iter(pending))
        add(name, pending.pop(name))
    return joined


def _located_list(values: Iterable[T], entry: Entry[ModelFile], path: YamlPath) -> list[Located[T]]:
    return [Located(value, entry, (*path, i)) for i, value in enumerate(values)]
