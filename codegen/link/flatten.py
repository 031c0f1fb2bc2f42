"""Makes a layout that extends another one complete: merges the sections and applies the patches.

Every piece keeps the file and the path it came from, so that later findings point to the right one of the two files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sageLLM.codegen.diagnostics import Sink, Span, did_you_mean
from sageLLM.codegen.expr.syntax import Text
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.models import (
    AlibiSection,
    BlockSpec,
    CacheSection,
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
    """A piece of a spec and where it stands."""

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
    """A block with everything it inherits; `place` is where its own file speaks of it."""

    place: Placed[BlockSpec]
    summary: str | None = None
    op_type: Placed[str | Mapping[str, str]] | None = None
    hf: Placed[str] | None = None
    weights: dict[str, Placed[WeightSpec]] = field(default_factory=dict)
    args: dict[str, Placed[str]] = field(default_factory=dict)
    body: list[Placed[str]] = field(default_factory=list)
    returns: list[Placed[str]] = field(default_factory=list)


@dataclass(slots=True)
class FlatRepeat:
    """The loop of a program."""

    place: Placed[RepeatSpec]
    body: list[Placed[str]]


@dataclass(slots=True)
class FlatModel:
    """A layout with everything it inherits."""

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
    program: list[Placed[str] | FlatRepeat] = field(default_factory=list)
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
    """The complete layout, or None after reporting that its base cannot be used."""
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
        help = f"extend '{base.spec.extends}'" if base.name != entry.name else "name the layout it starts from"
        sink.error("SAGE201", f"'{name}' itself extends '{base.spec.extends}'", entry.span("extends"), help)
        return None
    flat = FlatModel(entry, base)
    _merge(flat, base, sink)
    _merge(flat, entry, sink)
    return flat


def _merge(flat: FlatModel, entry: Entry[ModelFile], sink: Sink) -> None:
    """Lets a file's own words join (mappings, checks, ignored names) or replace (the rest) what is there."""
    spec = entry.spec
    _place_all(flat.config, spec.config, entry, ("config",))
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
        flat.program = [_statement(item, entry, ("program", i)) for i, item in enumerate(spec.program)]
    if spec.program is not None:
        flat.hidden = None  # it names a value of the program that is replaced
    if spec.hidden is not None:
        flat.hidden = Placed(spec.hidden, entry, ("hidden",))
    if spec.returns is not None:
        flat.returns = _placed_list(spec.returns, entry, ("returns",))
    for name, block in spec.blocks.items():
        _merge_block(flat, name, Placed(block, entry, ("blocks", name)), sink)
    _patch_program(flat, _placed_list(spec.patch, entry, ("patch",)), sink)


def _merge_block(flat: FlatModel, name: str, place: Placed[BlockSpec], sink: Sink) -> None:
    spec, entry, path = place.value, place.entry, place.path
    block = flat.blocks.setdefault(name, FlatBlock(place))
    block.place = place
    block.summary = spec.summary or block.summary
    if spec.op_type is not None:
        given = spec.op_type
        op_type = given if isinstance(given, str) else {str(phase): name for phase, name in given.items()}
        block.op_type = Placed(op_type, entry, (*path, "op_type"))
    if spec.hf is not None:
        block.hf = Placed(spec.hf, entry, (*path, "hf"))
    _place_all(block.weights, spec.weights, entry, (*path, "weights"))
    if spec.args is not None:
        block.args = {arg: Placed(type_, entry, (*path, "args", arg)) for arg, type_ in spec.args.items()}
    if spec.body is not None:
        block.body = _placed_list(spec.body, entry, (*path, "body"))
    if spec.returns is not None:
        block.returns = _placed_list(spec.returns, entry, (*path, "returns"))
    for patch in _placed_list(spec.patch, entry, (*path, "patch")):
        _apply(patch, [block.body], sink)


def _patch_program(flat: FlatModel, patches: Iterable[Placed[PatchSpec]], sink: Sink) -> None:
    for patch in patches:
        top = [item for item in flat.program if isinstance(item, Placed)]
        inner = [item.body for item in flat.program if isinstance(item, FlatRepeat)]
        if not _matches(patch, top):
            _apply(patch, inner, sink, also=top)
            continue
        lists: list[list[Any]] = [flat.program, *inner]
        _apply(patch, lists, sink)


def _apply(patch: Placed[PatchSpec], lists: Sequence[list[Any]], sink: Sink, also: Sequence[Placed[str]] = ()) -> None:
    """Edits the one statement that begins with the anchor, or reports that there is not exactly one."""
    found = [(items, item) for items in lists for item in _matches(patch, items)]
    kind, anchor = _anchor(patch.value)
    if len(found) != 1:
        lines = [item.value for items in (*lists, also) for item in items if isinstance(item, Placed)]
        candidates = [item.value for _, item in found] or lines
        count = f"{len(found)} statements begin" if found else "no statement begins"
        help = ("make it longer; it matches: " if found else "the statements are: ") + "; ".join(candidates)
        sink.error("SAGE202", f"{count} with '{anchor}'", patch.span(kind), help)
        return
    items, item = found[0]
    at = items.index(item)
    key, added = ("with", patch.value.with_) if kind == "replace" else ("add", patch.value.add)
    new = _placed_list(added or [], patch.entry, (*patch.path, key))
    start, stop = {"before": (at, at), "after": (at + 1, at + 1), "replace": (at, at + 1)}[kind]
    items[start:stop] = new


def _matches(patch: Placed[PatchSpec], items: Iterable[Any]) -> list[Placed[str]]:
    _, anchor = _anchor(patch.value)
    return [item for item in items if isinstance(item, Placed) and _words(item.value).startswith(_words(anchor))]


def _anchor(patch: PatchSpec) -> tuple[str, str]:
    anchors = {"before": patch.before, "after": patch.after, "replace": patch.replace}
    return next((kind, text) for kind, text in anchors.items() if text is not None)


def _words(text: str) -> str:
    return " ".join(text.split())


def _statement(item: str | RepeatSpec, entry: Entry[ModelFile], path: YamlPath) -> Placed[str] | FlatRepeat:
    if isinstance(item, str):
        return Placed(item, entry, path)
    return FlatRepeat(Placed(item, entry, path), _placed_list(item.do, entry, (*path, "do")))


def _place_all(table: dict[str, Placed[T]], items: Mapping[str, T], entry: Entry[ModelFile], path: YamlPath) -> None:
    for name, value in items.items():
        table[name] = Placed(value, entry, (*path, name))


def _placed_list(values: Iterable[T], entry: Entry[ModelFile], path: YamlPath) -> list[Placed[T]]:
    return [Placed(value, entry, (*path, i)) for i, value in enumerate(values)]
