"""Links passes: rules against the ops they name, expectations against the models, and the order of the pipeline."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.syntax import Refused, Text, check_grammar, parse_statements
from sageLLM.codegen.link.expectations import link_expectations
from sageLLM.codegen.link.pass_ops import check_pass_names
from sageLLM.codegen.link.rule_checks import check_rules, find_circle
from sageLLM.codegen.link.rule_conditions import link_conditions
from sageLLM.codegen.link.rule_types import check_types
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.op import AttrName, OpDef, Scalar
from sageLLM.codegen.model.rule import PassDef, PatternCall, RuleDef
from sageLLM.codegen.schema.passes import PassSpec, RuleSpec


def link_passes(raw: RawSpecs, ops: Mapping[str, OpDef], sink: Sink) -> dict[str, PassDef]:
    """All sound passes in the order of the pipeline; findings go to the sink."""
    linked = {name: _link_pass(entry, raw, ops, sink) for name, entry in raw.passes.items()}
    _check_rule_passes(raw, ops, sink)
    passes = {name: linked[name] for name in _pipeline(raw, sink) if name in linked}
    check_rules(list(passes.values()), sink)
    return passes


def _link_pass(entry: Entry[PassSpec], raw: RawSpecs, ops: Mapping[str, OpDef], sink: Sink) -> PassDef:
    spec = entry.spec
    if spec.stage not in raw.pass_stages:
        help = did_you_mean(spec.stage, raw.pass_stages)
        sink.error("SAGE301", f"unknown stage '{spec.stage}'", entry.span("stage"), help)
    check_pass_names(entry, raw, ops, sink)
    rules = []
    for i, rule in enumerate(spec.rules):
        try:
            rules.append(_link_rule(rule, i, entry, ops, sink))
        except Refused:
            continue
    return PassDef(entry.name, entry, tuple(rules), link_expectations(entry, raw, sink))


# rules


def _link_rule(rule: RuleSpec, index: int, entry: Entry[PassSpec], ops: Mapping[str, OpDef], sink: Sink) -> RuleDef:
    path = ("rules", index)
    if rule.from_op is not None:
        return _derived_rule(rule.from_op, path, entry, ops, sink)
    pattern = tuple(_calls(rule.match or [], (*path, "match"), entry, ops, sink))
    replacement = tuple(_calls(rule.rewrite or [], (*path, "rewrite"), entry, ops, sink))
    linked = RuleDef(rule.name or "", pattern, tuple(rule.keep), replacement, rule.benefit, path, bounded=rule.bounded)
    _check_names(linked, entry, sink)
    check_types(linked, entry, sink)
    return replace(linked, where=tuple(link_conditions(rule.where, linked, entry, sink)))


def _derived_rule(
    name: str, path: tuple[str | int, ...], entry: Entry[PassSpec], ops: Mapping[str, OpDef], sink: Sink
) -> RuleDef:
    op = ops.get(name)
    if op is None or not op.fuses or op.rule is None:
        known = [other.name for other in ops.values() if other.fuses and other.rule]
        message = f"unknown op '{name}'" if op is None else f"'{name}' has no `fuses` with a `rule`"
        sink.error("SAGE303", message, entry.span(*path, "from_op"), did_you_mean(name, known))
        raise Refused
    if op.rule.pass_ != entry.name:
        message = f"'{name}' names the pass '{op.rule.pass_}', and stands in '{entry.name}'"
        related = (("its rule", op.rule.span),)
        sink.error("SAGE304", message, entry.span(*path, "from_op"), "let the two agree", related)
        raise Refused
    pattern = tuple(PatternCall(call.targets, ops[call.op], call.args, call.kwargs) for call in op.fuses)
    outputs = tuple(output.name for output in op.outputs)
    attrs = tuple((attr.name, AttrName(attr.name)) for attr in op.attrs)
    inputs = tuple(operand.name for operand in op.inputs)
    return RuleDef(name, pattern, outputs, (PatternCall(outputs, op, inputs, attrs),), op.rule.benefit, path)


def _calls(
    lines: list[str], path: tuple[str | int, ...], entry: Entry[PassSpec], ops: Mapping[str, OpDef], sink: Sink
) -> Iterator[PatternCall]:
    for i, line in enumerate(lines):
        yield _call(Text.of(line, entry, (*path, i), sink), ops)


def _call(text: Text, ops: Mapping[str, OpDef]) -> PatternCall:
    statements = parse_statements(text)
    match statements:
        case [ast.Assign(targets=[target], value=ast.Call(func=ast.Name(id=name)) as call)]:
            check_grammar(text, statements[0])
        case _:
            raise text.refuse("SAGE305", "a line is `values = op(values, attr=name)`", statements[0])
    if name not in ops:
        raise text.refuse("SAGE306", f"unknown op '{name}'", call.func, did_you_mean(name, ops))
    op = ops[name]
    return PatternCall(_targets(text, target, op), op, _arguments(text, call, op), _attributes(text, call, op))


def _targets(text: Text, node: ast.expr, op: OpDef) -> tuple[str, ...]:
    names = node.elts if isinstance(node, ast.Tuple) else [node]
    targets = [name.id for name in names if isinstance(name, ast.Name)]
    if len(targets) != len(names):
        raise text.refuse("SAGE305", "only names may stand before `=`", node)
    if len(targets) != len(op.outputs):
        given = ", ".join(output.name for output in op.outputs)
        raise text.refuse("SAGE307", f"{op.name} gives {len(op.outputs)} ({given}), not {len(targets)}", node)
    return tuple(targets)


def _arguments(text: Text, call: ast.Call, op: OpDef) -> tuple[str, ...]:
    args = [arg.id for arg in call.args if isinstance(arg, ast.Name)]
    required = sum(not operand.optional for operand in op.inputs)
    if len(args) != len(call.args):
        raise text.refuse("SAGE305", "an operand is a name", call)
    if not required <= len(args) <= len(op.inputs):
        wanted = ", ".join(operand.name for operand in op.inputs)
        raise text.refuse("SAGE307", f"{op.name} takes ({wanted}), got {len(args)} operands", call)
    return tuple(args)


def _attributes(text: Text, call: ast.Call, op: OpDef) -> tuple[tuple[str, AttrName | Scalar | None], ...]:
    attrs: list[tuple[str, AttrName | Scalar | None]] = []
    for keyword in call.keywords:
        name = keyword.arg or "**"
        if op.attr(name) is None:
            known = [attr.name for attr in op.attrs]
            raise text.refuse("SAGE308", f"{op.name} has no attr '{name}'", keyword, did_you_mean(name, known))
        match keyword.value:
            case ast.Name(id=value):
                attrs.append((name, AttrName(value)))
            case ast.Constant(value=bool() | int() | float() | str() as value):
                attrs.append((name, value))
            case _:
                raise text.refuse("SAGE305", "an attr is given a name or a constant", keyword.value)
    return tuple(attrs)


def _check_names(rule: RuleDef, entry: Entry[PassSpec], sink: Sink) -> None:
    """Every name of the replacement is bound by the pattern, and the replacement gives every kept value."""
    path = rule.path
    given = [target for call in rule.pattern for target in call.targets]
    for name in sorted({name for name in given if given.count(name) > 1}):
        sink.error("SAGE309", f"'{name}' is given twice by the pattern", entry.span(*path, "match"), "use two names")
    values = {*given, *(arg for call in rule.pattern for arg in call.args if arg)}
    attrs = {value.name for call in rule.pattern for _, value in call.attrs if isinstance(value, AttrName)}
    inner = set(given)
    for i, call in enumerate(rule.replacement):
        for arg in call.args:
            if arg not in values:
                place = entry.span(*path, "rewrite", i)
                sink.error("SAGE310", f"'{arg}' is not bound by the pattern", place, did_you_mean(str(arg), values))
            elif arg in inner:
                message = f"'{arg}' is a value of the pattern, which the rewrite takes away"
                sink.error("SAGE310", message, entry.span(*path, "rewrite", i), "read what the pattern reads")
        for _, value in call.attrs:
            if isinstance(value, AttrName) and value.name not in attrs:
                place = entry.span(*path, "rewrite", i)
                sink.error("SAGE310", f"attr '{value.name}' is not bound by the pattern", place)
        inner -= set(call.targets)
        values |= set(call.targets)
    made = {target for call in rule.replacement for target in call.targets}
    for i, name in enumerate(rule.keep):
        if name not in given or name not in made:
            what = "a value of the pattern" if name not in given else "given by the rewrite"
            sink.error("SAGE311", f"the kept '{name}' is not {what}", entry.span(*path, "keep", i))
    missing = [name for name in rule.anchor.targets if name not in made]
    if missing:
        message = f"the rewrite does not give '{missing[0]}', the result of the pattern"
        sink.error("SAGE311", message, entry.span(*path, "rewrite"))
    _check_connected(rule, entry, sink)


def _check_connected(rule: RuleDef, entry: Entry[PassSpec], sink: Sink) -> None:
    """Values lead from the last call of the pattern, where matching starts, to every other one."""
    found = {len(rule.pattern) - 1, *(step.position for step in rule.search())}
    for i, call in enumerate(rule.pattern):
        if i not in found:
            message = f"'{', '.join(call.targets)}' has no value in common with the lines that lead to the last one"
            sink.error("SAGE312", message, entry.span(*rule.path, "match", i), "matching starts at the last line")


def _check_rule_passes(raw: RawSpecs, ops: Mapping[str, OpDef], sink: Sink) -> None:
    """A `rule` of an op names a pass that lists it."""
    for op in ops.values():
        if op.rule is None:
            continue
        one = raw.passes.get(op.rule.pass_)
        if one is None:
            sink.error(
                "SAGE315", f"unknown pass '{op.rule.pass_}'", op.rule.span, did_you_mean(op.rule.pass_, raw.passes)
            )
        elif op.name not in [rule.from_op for rule in one.spec.rules]:
            help = f"add `{{from_op: {op.name}}}` to its rules"
            sink.error("SAGE315", f"the pass '{one.name}' does not list '{op.name}'", op.rule.span, help)


# order


def _pipeline(raw: RawSpecs, sink: Sink) -> list[str]:
    """The passes by stage, and within a stage as `after` and `before` say, else in spec order."""
    stages = list(raw.pass_stages)
    names = [name for stage in stages for name, entry in raw.passes.items() if entry.spec.stage == stage]
    edges: list[tuple[str, str]] = []
    for name in names:
        entry = raw.passes[name]
        for key, others in (("after", entry.spec.after), ("before", entry.spec.before)):
            for i, other in enumerate(others):
                if other not in raw.passes:
                    span = entry.span(key, i)
                    sink.error("SAGE318", f"unknown pass '{other}'", span, did_you_mean(other, raw.passes))
                elif other in names:
                    edges.append((other, name) if key == "after" else (name, other))
    order = _ordered(names, edges)
    if len(order) < len(names):
        circle = [a for a, _ in find_circle(edges)]
        path = " -> ".join([*circle, circle[0]])
        sink.error("SAGE319", f"the order of passes is a circle: {path}", raw.passes[circle[0]].key_span())
    return order


def _ordered(names: list[str], edges: list[tuple[str, str]]) -> list[str]:
    """Always the first name whose predecessors are all out; what stands in a circle is left out."""
    order: list[str] = []
    waiting = list(names)
    while ready := [name for name in waiting if all(a in order for a, b in edges if b == name)]:
        order.append(ready[0])
        waiting.remove(ready[0])
    return order
