"""The types of a flattened layout: a layout with everything that it inherits, before it is linked.

Every value keeps its file and path, so that later findings point to the right one of the two files.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sageLLM.codegen.diagnostics import Sink, Span
from sageLLM.codegen.expr.syntax import Text
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.models import (
    AlibiSection,
    BlockSpec,
    CacheSection,
    ChooseSpec,
    ConfigField,
    ModelFile,
    RepeatSpec,
    RopeSection,
    WeightSpec,
)

T = TypeVar("T")
YamlPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Located(Generic[T]):
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
    """A block with everything that it inherits or uses; `located` is its most derived definition."""

    located: Located[BlockSpec]
    summary: str | None = None
    op_type: Located[str | Mapping[str, str]] | None = None
    hf: Located[str] | None = None
    weights: dict[str, Located[WeightSpec]] = field(default_factory=dict)
    args: dict[str, Located[str]] = field(default_factory=dict)
    body: "list[FlatLine]" = field(default_factory=list)
    returns: list[Located[str]] = field(default_factory=list)


@dataclass(slots=True)
class FlatBranch:
    """One branch of a `choose`."""

    when: Located[str] | None
    body: "list[FlatLine]"


@dataclass(slots=True)
class FlatChoose:
    """Statements that depend on the config or the layer."""

    located: Located[ChooseSpec]
    branches: list[FlatBranch]


FlatLine = Located[str] | FlatChoose


@dataclass(slots=True)
class FlatRepeat:
    """The loop of a program."""

    located: Located[RepeatSpec]
    body: list[FlatLine]


def plain_lines(items: "Iterable[FlatLine | FlatRepeat]") -> Iterator[Located[str]]:
    """The statements of a body, including those of loops and of all branches."""
    for item in items:
        if isinstance(item, Located):
            yield item
        for body in inner_bodies(item):
            yield from plain_lines(body)


def conditions(items: "Iterable[FlatLine | FlatRepeat]") -> Iterator[Located[str]]:
    """The conditions of all branches of a body."""
    for item in items:
        if isinstance(item, FlatChoose):
            yield from (branch.when for branch in item.branches if branch.when is not None)
        for body in inner_bodies(item):
            yield from conditions(body)


def inner_bodies(item: "FlatLine | FlatRepeat") -> "list[list[FlatLine]]":
    """The bodies of a loop, or of the branches of a `choose`."""
    if isinstance(item, FlatChoose):
        return [branch.body for branch in item.branches]
    return [item.body] if isinstance(item, FlatRepeat) else []


@dataclass(slots=True)
class FlatModel:
    """A layout with everything that it inherits. `sources` are all other layouts that parts of it come from."""

    entry: Entry[ModelFile]
    base: Entry[ModelFile] | None = None
    sources: tuple[Entry[ModelFile], ...] = ()
    dropped: dict[str, Span] = field(default_factory=dict)
    """Names that `drop` removed, and where."""
    inherited: frozenset[str] = frozenset()
    """Config names of the base."""
    config: dict[str, Located[ConfigField]] = field(default_factory=dict)
    checks: list[Located[str]] = field(default_factory=list)
    rope: Located[RopeSection | dict[str, RopeSection]] | None = None
    alibi: Located[AlibiSection] | None = None
    cache: Located[CacheSection] | None = None
    divides: list[Located[str]] = field(default_factory=list)
    weights: dict[str, Located[WeightSpec]] = field(default_factory=dict)
    blocks: dict[str, FlatBlock] = field(default_factory=dict)
    program: list[FlatLine | FlatRepeat] = field(default_factory=list)
    returns: list[Located[str]] = field(default_factory=list)
    hidden: Located[str] | None = None
    phases: dict[str, Located[str]] = field(default_factory=dict)
    ignore: list[Located[str]] = field(default_factory=list)
    tiny: dict[str, object] = field(default_factory=dict)

    @property
    def span(self) -> Span:
        return self.entry.span("model")

    @property
    def ropes(self) -> dict[str, Located[RopeSection]]:
        """The rotary tables by name; a single pair has the name ""."""
        if self.rope is None:
            return {}
        entry, path, value = self.rope.entry, self.rope.path, self.rope.value
        if isinstance(value, RopeSection):
            return {"": Located(value, entry, path)}
        return {name: Located(section, entry, (*path, name)) for name, section in value.items()}


def flat_lines(items: Iterable[str | ChooseSpec], entry: Entry[ModelFile], path: YamlPath) -> list[FlatLine]:
    """The statements of a body with their locations."""
    return [flat_line(item, entry, (*path, i)) for i, item in enumerate(items)]


def flat_line(item: str | ChooseSpec, entry: Entry[ModelFile], path: YamlPath) -> FlatLine:
    """A statement, or a `choose` with its branches, with their locations."""
    if isinstance(item, str):
        return Located(item, entry, path)
    branches: list[FlatBranch] = []
    for i, branch in enumerate(item.choose):
        here = (*path, "choose", i)
        when = Located(branch.when, entry, (*here, "when")) if branch.when is not None else None
        branches.append(FlatBranch(when, flat_lines(branch.do, entry, (*here, "do"))))
    return FlatChoose(Located(item, entry, path), branches)
