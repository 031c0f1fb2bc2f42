"""Flattens a layout that extends another one or uses its blocks: merges the sections, applies patches."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from sageLLM.codegen.diagnostics import Sink, Span, did_you_mean
from sageLLM.codegen.link.drops import drop_checks, drop_entries
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
from sageLLM.codegen.link.patches import apply_patch
from sageLLM.codegen.link.used_blocks import Brought, bring
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.models import BlockSpec, ConfigField, ModelFile, RepeatSpec


def flatten(entry: Entry[ModelFile], models: Mapping[str, Entry[ModelFile]], sink: Sink) -> FlatModel | None:
    """The complete layout, or None if its base, or a block that it uses, cannot be used."""
    return _Flattener(models, sink).flatten(entry)


class _Used(NamedTuple):
    """A block of another layout, and that layout."""

    layout: FlatModel
    block: FlatBlock


@dataclass(frozen=True, slots=True)
class _Flattener:
    """Flattens a layout and the layouts that it is made of. `path` are the layouts from the first one to this one."""

    models: Mapping[str, Entry[ModelFile]]
    sink: Sink
    path: tuple[str, ...] = ()

    def flatten(self, entry: Entry[ModelFile]) -> FlatModel | None:
        inner = _Flattener(self.models, self.sink, (*self.path, entry.name))
        flat, extends = FlatModel(entry), entry.spec.extends
        if extends is not None:
            base = inner._source(extends, entry.span("extends"))
            if base is None:
                return None
            inherited = frozenset(base.config)
            flat = replace(base, entry=entry, base=base.entry, sources=(base.entry, *base.sources), inherited=inherited)
        using = {name: block.use for name, block in entry.spec.blocks.items() if block.use is not None}
        used = {name: inner._used(use, entry.span("blocks", name, "use")) for name, use in using.items()}
        for name, source in used.items():
            if source is None:
                return None
            flat.blocks[name] = source.block
            layouts = (source.layout.entry, *source.layout.sources)
            flat.sources += tuple(one for one in layouts if one not in flat.sources)
        drop_entries(flat, self.sink)
        for name, spec in entry.spec.blocks.items():
            _merge_block(flat, name, Located(spec, entry, ("blocks", name)), self.sink)
        brought = bring({name: source.layout for name, source in used.items() if source is not None}, flat)
        drop_checks((flat.checks, brought.checks), entry, self.sink)
        _merge(flat, brought, self.sink)
        return flat

    def _used(self, use: str, span: Span) -> _Used | None:
        """The block `LAYOUT.BLOCK`, or None after reporting that it cannot be used."""
        name, dot, block = use.partition(".")
        if not dot:
            message = f"expected a block of another layout, got '{use}'"
            self.sink.error("SAGE245", message, span, "write `use: LAYOUT.BLOCK`, e.g. `use: llama.ffn`")
            return None
        layout = self._source(name, span)
        if layout is None:
            return None
        if block not in layout.blocks:
            near = did_you_mean(block, layout.blocks)
            self.sink.error("SAGE245", f"expected a block of '{name}', got '{block}'", span, near)
            return None
        return _Used(layout, layout.blocks[block])

    def _source(self, name: str, span: Span) -> FlatModel | None:
        """Another layout, complete, or None after reporting that it is unknown or leads back to this one."""
        if name in self.path:
            message = f"a layout must not be made of itself: {' -> '.join((*self.path, name))}"
            self.sink.error("SAGE201", message, span, "name another layout")
            return None
        if name not in self.models:
            others = [model for model in self.models if model not in self.path]
            self.sink.error("SAGE201", f"unknown layout '{name}'", span, did_you_mean(name, others))
            return None
        return self.flatten(self.models[name])


def _merge(flat: FlatModel, brought: Brought, sink: Sink) -> None:
    """Merges the file without its blocks: mappings, checks and ignored names are extended, the rest is replaced."""
    entry, spec = flat.entry, flat.entry.spec
    own = {name: Located(field_, entry, ("config", name)) for name, field_ in spec.config.items()}
    flat.config = _joined_config(flat.config, brought.config | own)
    _locate_all(flat.weights, spec.weights, entry, ("weights",))
    flat.checks += brought.checks
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
    known: Mapping[str, Located[ConfigField]], own: Mapping[str, Located[ConfigField]]
) -> dict[str, Located[ConfigField]]:
    """The config in definition order: inherited names keep their position; new names come last, or just before the
    first redefined or new name that reads them, because an expression may only read earlier names."""
    joined: dict[str, Located[ConfigField]] = {}
    pending = {name: located for name, located in own.items() if name not in known}

    def add(name: str, located: Located[ConfigField]) -> None:
        field_ = located.value
        for word in re.findall(r"[A-Za-z]\w*", f"{field_.value} {field_.default} {field_.if_null}"):
            if word in pending:
                add(word, pending.pop(word))
        joined[name] = located

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
