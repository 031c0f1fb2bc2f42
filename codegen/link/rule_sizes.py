"""Checks that a rewrite rule keeps the sizes of results, for all sizes that its pattern may have.

The sizes of the pattern are symbols, one per dim of a line that earlier lines do not determine. A pattern that relates
them in other ways is not checked, and neither is a rule with `where` on sizes. A rewrite is also refused when it is
applied to a graph in which it does not fit; but a rule that fits special sizes only is most likely a mistake.
"""

import re
from collections.abc import Mapping

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.types import DTYPES, ValueType
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.binding import Binding, TypeMismatch
from sageLLM.codegen.model.rule import PatternCall, RuleDef
from sageLLM.codegen.schema.passes import PassSpec

Types = dict[str, ValueType]


def check_sizes(rule: RuleDef, entry: Entry[PassSpec], sink: Sink) -> None:
    """Reports the first result that has other sizes in the replacement than in the pattern."""
    if any("size(" in condition.text or "bytes(" in condition.text for condition in rule.where):
        return
    types: Types = {}
    try:
        for i, call in enumerate(rule.pattern):
            _infer(call, types, str(i))
    except TypeMismatch:
        return
    made, found = dict(types), list[tuple[int, str]]()
    for i, call in zip(rule.lines, rule.replacement, strict=True):
        try:
            _infer(call, made, "new")
        except TypeMismatch:
            return
        found += [(i, why) for name in call.targets if (why := _why_other(name, made[name], types))]
    positions = [i for i in range(len(rule.lines) + len(rule.same)) if i not in rule.lines]
    for i, (name, value) in zip(positions, rule.same, strict=True):
        if value in types and (why := _why_other(name, types[value], types)):
            found.append((i, why))
    for i, why in found[:1]:
        help = "rewrite to an op with the same result, or require equal sizes with `where`"
        sink.error("SAGE320", why, entry.span(*rule.path, "rewrite", i), help)


def _why_other(name: str, made: ValueType, types: Mapping[str, ValueType]) -> str | None:
    """The difference of a result from that of the pattern, or None."""
    expected = types.get(name)
    if expected is None or expected.dims == made.dims:
        return None
    return f"'{name}' must have the dims of the pattern, {_shown(expected)}, got {_shown(made)}"


def _infer(call: PatternCall, types: Types, line: str) -> None:
    """Binds the dims of a line to the types of known values, and adds the types of the others."""
    binding = Binding()
    binding.fix(call.op, call.attrs)
    operands = [(o.type, value) for o in call.op.inputs if (value := call.operands[o.name]) is not None]
    for declared, value in operands:
        if value in types:
            binding.match(_sizes_only(declared), types[value])
    for declared in (*(type_ for type_, _ in operands), *(output.type for output in call.op.outputs)):
        if LEADING in declared.dims and binding.leading is None:
            binding.leading = (Size.symbol(f"R_{line}"),)
        for symbol in (symbol for dim in declared.dims if dim != LEADING for symbol in dim.symbols):
            binding.dims.setdefault(symbol, Size.symbol(f"{symbol}_{line}"))
    for declared, value in operands:
        types.setdefault(value, binding.apply(_sizes_only(declared)))
    for output, name in zip(call.op.outputs, call.targets, strict=True):
        types[name] = binding.apply(_sizes_only(output.type))


def _sizes_only(type_: ValueType) -> ValueType:
    """The type with a fixed element type: `rule_types` checks those."""
    return ValueType(next(iter(DTYPES)), type_.dims)


def _shown(type_: ValueType) -> str:
    """The dims; the number of a line follows the names of dims that do not come from the first one."""
    text = ", ".join(str(dim) for dim in type_.dims)
    return f"[{re.sub(r'_0', '', re.sub(r'R_[a-z0-9]+', '...', text))}]"
