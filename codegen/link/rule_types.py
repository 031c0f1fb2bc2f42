"""Checks that every value of a rewrite rule can have one type in all lines of its pattern and replacement.

Only the number of dims and the element type are checked. Both are integer unknowns, and each line states that two of
them are equal or differ by a constant: `E[..., H]` has one dim more than the line's leading dims. Sizes are checked
when the rule is applied to a graph, where a rewrite that does not fit is refused with a reason.
"""

from dataclasses import dataclass, field

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.expr.size import LEADING
from sageLLM.codegen.expr.types import DTYPES, ValueType
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.rule import PatternCall, RuleDef
from sageLLM.codegen.schema.passes import PassSpec

ZERO = ""


@dataclass(slots=True)
class Differences:
    """Integer unknowns with known differences, as a union-find with offsets. The unknown ZERO is 0."""

    _parents: dict[str, tuple[str, int]] = field(default_factory=dict)

    def tie(self, a: str, b: str, difference: int) -> bool:
        """Records that a - b is the difference; False if this contradicts earlier records."""
        (root_a, from_a), (root_b, from_b) = self._root(a), self._root(b)
        if root_a == root_b:
            return from_a - from_b == difference
        self._parents[root_a] = (root_b, difference + from_b - from_a)
        return True

    def _root(self, name: str) -> tuple[str, int]:
        offset = 0
        while name in self._parents:
            name, more = self._parents[name]
            offset += more
        return name, offset


def check_types(rule: RuleDef, entry: Entry[PassSpec], sink: Sink) -> None:
    """Reports the first line of a rule in which a value has a type that earlier lines exclude."""
    known = Differences()
    lines = [("match", i, call) for i, call in enumerate(rule.pattern)]
    positions = rule.lines or range(len(rule.replacement))
    lines += [("rewrite", i, call) for i, call in zip(positions, rule.replacement, strict=True)]
    for key, i, call in lines:
        for role, type_, value in _uses(call):
            if not _fits(known, f"{key} {i}", type_, value):
                message = f"'{value}' is {type_} as {call.op.name}.{role}, which contradicts the lines before"
                sink.error("SAGE320", message, entry.span(*rule.path, key, i), "as written, the rule never fires")
                return


def _uses(call: PatternCall) -> list[tuple[str, ValueType, str]]:
    """Role, type and name of each value of a line."""
    types = {operand.name: operand.type for operand in call.op.inputs}
    reads = [(name, types[name], value) for name, value in call.operands.items() if value is not None]
    return [*reads, *((o.name, o.type, value) for o, value in zip(call.op.outputs, call.targets, strict=True))]


def _fits(known: Differences, line: str, type_: ValueType, value: str) -> bool:
    has_leading = type_.dims[:1] == (LEADING,)
    num_dims = known.tie(
        f"dims of {value}", f"leading of {line}" if has_leading else ZERO, len(type_.dims) - has_leading
    )
    if type_.element in DTYPES:
        return num_dims and known.tie(f"element of {value}", ZERO, list(DTYPES).index(type_.element))
    return num_dims and known.tie(f"element of {value}", f"{type_.element} of {line}", 0)
