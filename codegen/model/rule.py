"""What a pass means after linking: its place in the pipeline, and rules as patterns of op calls."""

from collections.abc import Mapping
from dataclasses import dataclass

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

    def __str__(self) -> str:
        words = [arg or "none" for arg in self.args]
        words += [f"{name}={value.name if isinstance(value, AttrName) else repr(value)}" for name, value in self.attrs]
        return f"{', '.join(self.targets)} = {self.op.name}({', '.join(words)})"


@dataclass(frozen=True, slots=True)
class RuleDef:
    """A rewrite rule. The last call of the pattern is its anchor; the others give its operands, directly or not."""

    name: str
    pattern: tuple[PatternCall, ...]
    keep: tuple[str, ...]
    replacement: tuple[PatternCall, ...]
    benefit: int
    path: tuple[str | int, ...]

    @property
    def anchor(self) -> PatternCall:
        return self.pattern[-1]

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
        return "".join(part.capitalize() for part in self.name.split("_"))
