"""Linked passes: their position in the pipeline, and their rules as patterns of op calls."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sageLLM.codegen.contents import class_name
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import Attr, AttrFormula, AttrName, AttrValue, OpDef
from sageLLM.codegen.schema.passes import PassSpec


@dataclass(frozen=True, slots=True)
class PatternCall:
    """`targets = op(args, attrs)` in a pattern or a replacement: names stand for values, attr names for attributes."""

    targets: tuple[str, ...]
    op: OpDef
    args: tuple[str | None, ...]
    attrs: tuple[tuple[str, AttrValue], ...]

    @property
    def operands(self) -> dict[str, str | None]:
        """Argument by operand name; None where an optional operand is absent."""
        names = [operand.name for operand in self.op.inputs]
        return dict(zip(names, (*self.args, *[None] * (len(names) - len(self.args))), strict=True))

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that the call reads."""
        return tuple(arg for arg in self.args if arg is not None)

    @property
    def optional_reads(self) -> set[str]:
        """The values read by optional operands."""
        return {arg for operand, arg in zip(self.op.inputs, self.args, strict=False) if arg and operand.optional}

    def __str__(self) -> str:
        words = [arg or "none" for arg in self.args]
        words += [f"{name}={_shown(value)}" for name, value in self.attrs]
        return f"{', '.join(self.targets)} = {self.op.name}({', '.join(words)})"


def _shown(value: AttrValue) -> str:
    match value:
        case AttrName(name=name):
            return name
        case AttrFormula(text=text):
            return text
    return repr(value)


def attrs_bound(pattern: Iterable[PatternCall]) -> dict[str, Attr]:
    """The attrs that names in a pattern stand for."""
    return {
        value.name: attr
        for call in pattern
        for name, value in call.attrs
        if isinstance(value, AttrName) and (attr := call.op.attr(name)) is not None
    }


class SearchStep(NamedTuple):
    """A call of the pattern by its position, and the known value `via` which it is found: a result or an operand."""

    position: int
    via: str


@dataclass(frozen=True, slots=True)
class RuleCondition:
    """A `where` line of a rule: its text, and its checked tree."""

    text: str
    node: ast.expr = field(compare=False)


@dataclass(frozen=True, slots=True)
class RuleDef:
    """A rewrite rule. Matching starts at the last call, the anchor, and follows values to the other calls."""

    name: str
    pattern: tuple[PatternCall, ...]
    keep: tuple[str, ...]
    replacement: tuple[PatternCall, ...]
    benefit: int
    path: tuple[str | int, ...]
    where: tuple[RuleCondition, ...] = ()
    bounded: int | None = None
    same: tuple[tuple[str, str], ...] = ()
    """(result, value): results of the pattern that equal another of its values, which replaces them."""
    lines: tuple[int, ...] = ()
    """The positions of the replacement's calls under `rewrite`, if the rule is written there."""

    @property
    def attrs_bound(self) -> dict[str, Attr]:
        return attrs_bound(self.pattern)

    @property
    def anchor(self) -> PatternCall:
        return self.pattern[-1]

    def search(self) -> list[SearchStep]:
        """The calls besides the anchor in the order in which matching finds them, each via one value known by then.

        A value that the call produces is preferred, since a value has one producer but may have many consumers; then
        a value produced by the pattern that it reads; then any value that it reads. An unreachable call is left out.
        """
        waiting = list(enumerate(self.pattern))[-2::-1]
        known, produced = {*self.anchor.reads, *self.anchor.targets}, set(self.anchor.targets)
        found: list[SearchStep] = []
        while waiting:
            steps = (
                [SearchStep(i, name) for i, call in waiting for name in call.targets if name in known],
                [SearchStep(i, name) for i, call in waiting for name in call.reads if name in produced],
                [SearchStep(i, name) for i, call in waiting for name in call.reads if name in known],
            )
            step = next((options[0] for options in steps if options), None)
            if step is None:
                break
            found.append(step)
            call = self.pattern[step.position]
            known |= {*call.reads, *call.targets}
            produced |= {*call.targets}
            waiting = [(i, call) for i, call in waiting if i != step.position]
        return found

    @property
    def optional(self) -> set[str]:
        """The values that may be absent, because only optional operands of the pattern and replacement read them."""
        calls = [*self.pattern, *self.replacement]
        required = {name for call in calls for name in (*call.targets, *call.reads) if name not in call.optional_reads}
        return {name for call in calls for name in call.reads} - required

    @property
    def algebra(self) -> str:
        """The rule in one line."""
        return f"{'; '.join(map(str, self.pattern))} -> {'; '.join(self.results)}"

    @property
    def results(self) -> list[str]:
        """The lines of the replacement."""
        return [*map(str, self.replacement), *(f"{result} = {value}" for result, value in self.same)]


@dataclass(frozen=True, slots=True)
class PassDef:
    """One pass. `expect` maps models to Python text over their config `c`."""

    name: str
    entry: Entry[PassSpec]
    rules: tuple[RuleDef, ...]
    expect: Mapping[str, str]

    @property
    def spec(self) -> PassSpec:
        return self.entry.spec

    @property
    def ref(self) -> str:
        return self.entry.ref

    @property
    def class_name(self) -> str:
        return class_name(self.name)
