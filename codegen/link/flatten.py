"""Flattens a layout that extends another one: merges the sections and applies drops and patches.

Every value keeps its file and path, so that later findings point to the right one of the two files.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sageLLM.codegen.diagnostics import Sink, Span, did_you_mean
from sageLLM.codegen.expr.syntax import Text
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.models import (
    AlibiSection,
    BlockSpec,
    CacheSection,
    ChooseSpec,
    ConfigField,
    ModelFile,
    PatchSpec,
    RepeatSpec,
    RopeSection,
    WeightSpec,
)

T = TypeVar("T")
YamlPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Placed(Generic[T]):
    """A value of a spec with its source location."""

    value: T
    entry: Entry[ModelFile]
    path: YamlPath

    def span(self, *path: str | int) -> Span:
        return self.entry.span(*self.path, *path)

    def key_span(self, *path: str | int) -> Span:
        return self.entry.key_span(*self.path, *path)

    def text(self, value: str, sink: Sink, *path: str | int) -> Text:
        return Text.of(value, self.entry, (*self.path, *path), sink)


@dataclass(slots=True)
class FlatBlock:
    """A block with everything that it inherits; `place` is the location of its most derived definition."""

    place: Placed[BlockSpec]
    summary: str | None = None
    op_type: Placed[str | Mapping[str, str]] | None = None
    hf: Placed[str] | None = None
    weights: dict[str, Placed[WeightSpec]] = field(default_factory=dict)
    args: dict[str, Placed[str]] = field(default_factory=dict)
    body: "list[FlatLine]" = field(default_factory=list)
    returns: list[Placed[str]] = field(default_factory=list)


@dataclass(slots=True)
class FlatBranch:
    """One branch of a `choose`."""

    when: Placed[str] | None
    body: "list[FlatLine]"


@dataclass(slots=True)
class FlatChoose:
    """Statements that depend on the config or the layer."""

    place: Placed[ChooseSpec]
    branches: list[FlatBranch]


FlatLine = Placed[str] | FlatChoose


@dataclass(slots=True)
class FlatRepeat:
    """The loop of a program."""

    place: Placed[RepeatSpec]
    body: list[FlatLine]


def plain_lines(items: "Iterable[FlatLine | FlatRepeat]") -> Iterator[Placed[str]]:
    """The statements of a body, including those of loops and of all branches."""
    for item in items:
        if isinstance(item, Placed):
            yield item
        for body in _inner_bodies(item):
            yield from plain_lines(body)


def conditions(items: "Iterable[FlatLine | FlatRepeat]") -> Iterator[Placed[str]]:
    """The conditions of all branches of a body."""
    for item in items:
        if isinstance(item, FlatChoose):
            yield from (branch.when for branch in item.branches if branch.when is not None)
        for body in _inner_bodies(item):
            yield from conditions(body)


def _inner_bodies(item: "FlatLine | FlatRepeat") -> "list[list[FlatLine]]":
    if isinstance(item, FlatChoose):
        return [branch.body for branch in item.branches]
    return [item.body] if isinstance(item, FlatRepeat) else []


@dataclass(slots=True)
class FlatModel:
    """A layout with everything that it inherits."""

    entry: Entry[ModelFile]
    base: Entry[ModelFile] | None
    config: dict[str, Placed[ConfigField]] = field(default_factory=dict)
    checks: list[Placed[str]] = field(default_factory=list)
    rope: Placed[RopeSection | dict[str, RopeSection]] | None = None
    alibi: Placed[AlibiSection] | None = None
    cache: Placed[CacheSection] | None = None
    divides: list[Placed[str]] = field(default_factory=list)
    weights: dict[str, Placed[WeightSpec]] = field(default_factory=dict)
    blocks: dict[str, FlatBlock] = field(default_factory=dict)
    program: list[FlatLine | FlatRepeat] = field(default_factory=list)
    returns: list[Placed[str]] = field(default_factory=list)
    hidden: Placed[str] | None = None
    phases: dict[str, Placed[str]] = field(default_factory=dict)
    ignore: list[Placed[str]] = field(default_factory=list)
    tiny: dict[str, object] = field(default_factory=dict)

    @property
    def span(self) -> Span:
        return self.entry.span("model")

    @property
    def ropes(self) -> dict[str, Placed[RopeSection]]:
        """The rotary tables by name; a single pair has the name ""."""
        if self.rope is None:
            return {}
        entry, path, value = self.rope.entry, self.rope.path, self.rope.value
        if isinstance(value, RopeSection):
            return {"": Placed(value, entry, path)}
        return {name: Placed(section, entry, (*path, name)) for name, section in value.items()}


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
        _drop_names(table, Placed(names, entry, ("drop", section)), sink)
    for block, content in spec.blocks.items():
        if block not in flat.blocks:
            help = did_you_mean(block, flat.blocks)
            span = entry.key_span("drop", "blocks", block)
            sink.error("SAGE209", f"expected an inherited block, got '{block}'", span, help)
        elif content is None:
            del flat.blocks[block]
        else:
            place = Placed(content.weights, entry, ("drop", "blocks", block, "weights"))
            _drop_names(flat.blocks[block].weights, place, sink)
    for i, text in enumerate(spec.checks):
        found = [place for place in flat.checks if _words(place.value) == _words(text)]
        if not found:
            help = f"the inherited checks: {'; '.join(place.value for place in flat.checks)}"
            message = f"expected an inherited check, got '{text}'"
            sink.error("SAGE209", message, entry.span("drop", "checks", i), help)
        flat.checks = [place for place in flat.checks if place not in found]


def _drop_names(table: dict[str, Any], names: Placed[list[str]], sink: Sink) -> None:
    for i, name in enumerate(names.value):
        if table.pop(name, None) is None:
            sink.error("SAGE209", f"expected an inherited name, got '{name}'", names.span(i), did_you_mean(name, table))


def _merge(flat: FlatModel, entry: Entry[ModelFile], sink: Sink) -> None:
    """Merges a file into the layout: mappings, checks and ignored names are extended, the rest is replaced."""
    spec = entry.spec
    if flat.base is None and spec.drop is not None:
        sink.error("SAGE209", "`drop` requires `extends`", entry.key_span("drop"), "remove `drop`, or add `extends`")
    flat.config = _joined_config(flat.config, spec.config, entry)
    _place_all(flat.weights, spec.weights, entry, ("weights",))
    flat.checks += _placed_list(spec.checks, entry, ("checks",))
    flat.ignore += _placed_list(spec.ignore_hf, entry, ("ignore_hf",))
    flat.tiny |= spec.tests.tiny
    for phase, ops in spec.phases.items():
        flat.phases.update((phase, Placed(op, entry, ("phases", phase, form))) for form, op in ops.items())
    if "rope" in spec.model_fields_set:
        flat.rope = Placed(spec.rope, entry, ("rope",)) if spec.rope is not None else None
    if spec.alibi is not None:
        flat.alibi = Placed(spec.alibi, entry, ("alibi",))
    if spec.cache is not None:
        flat.cache = Placed(spec.cache, entry, ("cache",))
    if spec.tp is not None:
        flat.divides = _placed_list(spec.tp.divides, entry, ("tp", "divides"))
    if spec.program is not None:
        flat.program = [
            FlatRepeat(Placed(item, entry, ("program", i)), _lines(item.do, entry, ("program", i, "do")))
            if isinstance(item, RepeatSpec)
            else _line(item, entry, ("program", i))
            for i, item in enumerate(spec.program)
        ]
        flat.hidden = None  # it named a value of the replaced program
    if spec.hidden is not None:
        flat.hidden = Placed(spec.hidden, entry, ("hidden",))
    if spec.returns is not None:
        flat.returns = _placed_list(spec.returns, entry, ("returns",))
    for name, block in spec.blocks.items():
        _merge_block(flat, name, Placed(block, entry, ("blocks", name)), sink)
    for patch in _placed_list(spec.patch, entry, ("patch",)):
        _apply(patch, flat.program, sink)


def _merge_block(flat: FlatModel, name: str, place: Placed[BlockSpec], sink: Sink) -> None:
    spec, entry, path = place.value, place.entry, place.path
    block = flat.blocks.setdefault(name, FlatBlock(place))
    block.place = place
    block.summary = spec.summary or block.summary
    if spec.op_type is not None:
        declared = spec.op_type
        op_type = declared if isinstance(declared, str) else {str(phase): name for phase, name in declared.items()}
        block.op_type = Placed(op_type, entry, (*path, "op_type"))
    if spec.hf is not None:
        block.hf = Placed(spec.hf, entry, (*path, "hf"))
    _place_all(block.weights, spec.weights, entry, (*path, "weights"))
    if spec.args is not None:
        block.args = {arg: Placed(type_, entry, (*path, "args", arg)) for arg, type_ in spec.args.items()}
    if spec.body is not None:
        block.body = _lines(spec.body, entry, (*path, "body"))
    if spec.returns is not None:
        block.returns = _placed_list(spec.returns, entry, (*path, "returns"))
    for patch in _placed_list(spec.patch, entry, (*path, "patch")):
        _apply(patch, block.body, sink)


def _apply(patch: Placed[PatchSpec], body: list[Any], sink: Sink) -> None:
    """Edits the one statement that begins with the anchor; reports an anchor that does not match exactly once.

    A patch that matched twice, or not at all, would change the meaning of a layout silently when its base is edited.
    """
    kind, anchor = _anchor(patch.value)
    texts = [(items, item, _anchor_text(item)) for items in _bodies(body) for item in items]
    found = [(items, item, text) for items, item, text in texts if _words(text).startswith(_words(anchor))]
    if len(found) != 1:
        candidates = [text for _, _, text in found or texts if text]
        message = f"a patch must match exactly one statement, but '{anchor}' matches {len(found) or 'none'}"
        help = ("use a longer anchor; it matches: " if found else "the statements: ") + "; ".join(candidates)
        sink.error("SAGE202", message, patch.span(kind), help)
        return
    items, item, _ = found[0]
    at = items.index(item)
    key, added = ("with", patch.value.with_) if kind == "replace" else ("add", patch.value.add)
    new = _lines(added or [], patch.entry, (*patch.path, key))
    start, stop = {"before": (at, at), "after": (at + 1, at + 1), "replace": (at, at + 1)}[kind]
    items[start:stop] = new


def _bodies(body: list[Any]) -> Iterator[list[Any]]:
    """The list of statements, and those inside its loops and branches."""
    yield body
    for item in body:
        for inner in _inner_bodies(item):
            yield from _bodies(inner)


def _anchor_text(item: Any) -> str:
    """The text that patches match: that of a statement, or the first condition of a `choose`."""
    if isinstance(item, FlatChoose):
        when = item.branches[0].when
        return f"when {when.value}" if when is not None else ""
    return item.value if isinstance(item, Placed) else ""


def _anchor(patch: PatchSpec) -> tuple[str, str]:
    anchors = {"before": patch.before, "after": patch.after, "replace": patch.replace}
    return next((kind, text) for kind, text in anchors.items() if text is not None)


def _words(text: str) -> str:
    return " ".join(text.split())


def _lines(items: Iterable[str | ChooseSpec], entry: Entry[ModelFile], path: YamlPath) -> list[FlatLine]:
    return [_line(item, entry, (*path, i)) for i, item in enumerate(items)]


def _line(item: str | ChooseSpec, entry: Entry[ModelFile], path: YamlPath) -> FlatLine:
    if isinstance(item, str):
        return Placed(item, entry, path)
    branches: list[FlatBranch] = []
    for i, branch in enumerate(item.choose):
        here = (*path, "choose", i)
        when = Placed(branch.when, entry, (*here, "when")) if branch.when is not None else None
        branches.append(FlatBranch(when, _lines(branch.do, entry, (*here, "do"))))
    return FlatChoose(Placed(item, entry, path), branches)


def _place_all(table: dict[str, Placed[T]], items: Mapping[str, T], entry: Entry[ModelFile], path: YamlPath) -> None:
    for name, value in items.items():
        table[name] = Placed(value, entry, (*path, name))


def _joined_config(
    known: Mapping[str, Placed[ConfigField]], own: Mapping[str, ConfigField], entry: Entry[ModelFile]
) -> dict[str, Placed[ConfigField]]:
    """The config in definition order: inherited names keep their position; new names come last, or just before the
    first redefined name that reads them, because an expression may only read earlier names."""
    joined: dict[str, Placed[ConfigField]] = {}
    waiting = {name: field_ for name, field_ in own.items() if name not in known}

    def place(name: str, field_: ConfigField) -> None:
        for word in re.findall(r"[A-Za-z]\w*", f"{field_.value} {field_.default}"):
            if word in waiting:
                place(word, waiting.pop(word))
        joined[name] = Placed(field_, entry, ("config", name))

    for name, inherited in known.items():
        if name in own:
            place(name, own[name])
        else:
            joined[name] = inherited
    while waiting:
        name = next(iter(waiting))
        place(name, waiting.pop(name))
    return joined


def _placed_list(values: Iterable[T], entry: Entry[ModelFile], path: YamlPath) -> list[Placed[T]]:
    return [Placed(value, entry, (*path, i)) for i, value in enumerate(values)]
