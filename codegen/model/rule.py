"""What a pass means after linking: its place in the pipeline, and rules as patterns of op calls."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sageLLM.codegen.contents import class_name
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import AttrName, OpDef, Scalar
from sageLLM.codegen.schema.passes import PassSpec


@dataclass(frozen=True, slots=True)
class PatternCall:
    """`targets = op(args, attrs)` in a pattern or a replacement: names stand for values, attr names for attributes."""

    targets: tuple[str, ...]
    op: OpDef
    args: tuple[str | None, ...]
    attrs: tuple[tuple[str, AttrName | Scalar | None], ...]

    @property
    def operands(self) -> dict[str, str | None]:
        """Argument by operand name; None where an optional operand is absent."""
        names = [operand.name for operand in self.op.inputs]
        return dict(zip(names, (*self.args, *[None] * (len(names) - len(self.args))), strict=True))

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that it reads."""
        return tuple(arg for arg in self.args if arg is not None)

    @property
    def optional_reads(self) -> set[str]:
        """Those of them that it could do without."""
        return {arg for operand, arg in zip(self.op.inputs, self.args, strict=False) if arg and operand.optional}

    def __str__(self) -> str:
        words = [arg or "none" for arg in self.args]
        words += [f"{name}={value.name if isinstance(value, AttrName) else repr(value)}" for name, value in self.attrs]
        return f"{', '.join(self.targets)} = {self.op.name}({', '.join(words)})"


class Found(NamedTuple):
    """A call of the pattern by its position, and the value that leads to it: one that it gives, or else reads."""

    position: int
    by: str


@dataclass(frozen=True, slots=True)
class RuleCondition:
    """A `where` line of a rule: its text, and the tree that it was checked as."""

    text: str
    node: ast.expr = field(compare=False)


@dataclass(frozen=True, slots=True)
class RuleDef:
    """A rewrite rule. Matching starts at the last call, the anchor, and goes along values to the others."""

    name: str
    pattern: tuple[PatternCall, ...]
    keep: tuple[str, ...]
    replacement: tuple[PatternCall, ...]
    benefit: int
    path: tuple[str | int, ...]
    where: tuple[RuleCondition, ...] = ()
    bounded: int | None = None

    @property
    def anchor(self) -> PatternCall:
        return self.pattern[-1]

    def search(self) -> list[Found]:
        """The calls besides the anchor in the order in which matching finds them, each by one value known by then.

        Best is a value that the call gives, since it has one writer; then one of the pattern that it reads; then any
        that it reads. A call that nothing leads to is left out.
        """
        waiting = list(enumerate(self.pattern))[-2::-1]
        known, given = {*self.anchor.reads, *self.anchor.targets}, set(self.anchor.targets)
        found: list[Found] = []
        while waiting:
            steps = (
                [Found(i, name) for i, call in waiting for name in call.targets if name in known],
                [Found(i, name) for i, call in waiting for name in call.reads if name in given],
                [Found(i, name) for i, call in waiting for name in call.reads if name in known],
            )
            step = next((options[0] for options in steps if options), None)
            if step is None:
                break
            found.append(step)
            call = self.pattern[step.position]
            known |= {*call.reads, *call.targets}
            given |= {*call.targets}
            waiting = [(i, call) for i, call in waiting if i != step.position]
        return found

    @property
    def optional(self) -> set[str]:
        """The values that may be absent: nothing in the pattern or in the replacement needs them."""
        calls = [*self.pattern, *self.replacement]
        needed = {name for call in calls for name in (*call.targets, *call.reads) if name not in call.optional_reads}
        return {name for call in calls for name in call.reads} - needed

    @property
    def algebra(self) -> str:
        """The rule in one line."""
        return f"{'; '.join(map(str, self.pattern))} -> {'; '.join(map(str, self.replacement))}"


@dataclass(frozen=True, slots=True)
class PassDef:
    """One pass, in the order of the pipeline. `expect` is Python text over the model's config `c`, by model."""

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
