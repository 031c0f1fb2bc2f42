"""Links passes: their rules against the ops, their expectations against the models, and the order of the pipeline."""

import ast
from collections.abc import Mapping
from dataclasses import replace

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.syntax import Refused, Text, check_grammar, parse_statements
from sageLLM.codegen.link.attr_formulas import is_formula, link_formula
from sageLLM.codegen.link.expectations import link_expectations
from sageLLM.codegen.link.interfaces import Interfaces
from sageLLM.codegen.link.pass_ops import check_pass_names
from sageLLM.codegen.link.rule_checks import check_rules, find_cycle
from sageLLM.codegen.link.rule_conditions import link_conditions
from sageLLM.codegen.link.rule_sizes import check_sizes
from sageLLM.codegen.link.rule_types import check_types
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.op import Attr, AttrName, AttrValue, OpDef
from sageLLM.codegen.model.rule import PassDef, PatternCall, RuleDef, attrs_bound
from sageLLM.codegen.schema.passes import PassSpec, RuleSpec


def link_passes(raw: RawSpecs, ops: Interfaces, sink: Sink) -> dict[str, PassDef]:
    """All passes in the order of the pipeline; findings go to the sink.

    Reads the passes and their stages, the op types, the config names of models, and the `rule` of every op's entry.
    """
    linked = {name: _link_pass(entry, raw, ops, sink) for name, entry in raw.passes.items()}
    _check_rule_passes(raw, sink)
    passes = {name: linked[name] for name in _pipeline(raw, sink) if name in linked}
    check_rules(list(passes.values()), sink, lambda pass_: raw.is_base(pass_.entry))
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
    path, before = ("rules", index), len(sink.diagnostics)
    if rule.from_op is not None:
        return _derived_rule(rule.from_op, path, entry, ops, sink)
    lines = enumerate(rule.match or [])
    pattern = tuple(_call(Text.of(line, entry, (*path, "match", i), sink), ops, None) for i, line in lines)
    texts = [Text.of(line, entry, (*path, "rewrite", i), sink) for i, line in enumerate(rule.rewrite or [])]
    plain = {i: found for i, text in enumerate(texts) if (found := _plain_result(text)) is not None}
    attrs = attrs_bound(pattern)
    replacement = tuple(_call(text, ops, attrs) for i, text in enumerate(texts) if i not in plain)
    linked = RuleDef(
        rule.name or "",
        pattern,
        tuple(rule.keep),
        replacement,
        rule.benefit,
        path,
        bounded=rule.bounded,
        same=tuple(plain.values()),
        lines=tuple(i for i in range(len(texts)) if i not in plain),
    )
    _check_names(linked, entry, sink)
    check_types(linked, entry, sink)
    if len(sink.diagnostics) == before:
        check_sizes(linked, entry, sink)
    return replace(linked, where=tuple(link_conditions(rule.where, linked, entry, sink)))


def _derived_rule(
    name: str, path: tuple[str | int, ...], entry: Entry[PassSpec], ops: Mapping[str, OpDef], sink: Sink
) -> RuleDef:
    op = ops.get(name)
    if op is None or not op.fuses or op.rule is None:
        known = [other.name for other in ops.values() if other.fuses and other.rule]
        expected = "an op with `fuses` and `rule`"
        message = f"unknown op '{name}'" if op is None else f"expected {expected}, got '{name}'"
        sink.error("SAGE303", message, entry.span(*path, "from_op"), did_you_mean(name, known))
        raise Refused
    if op.rule.pass_ != entry.name:
        message = f"the rule of '{name}' belongs to the pass '{op.rule.pass_}', not to '{entry.name}'"
        related = (("its rule", op.rule.span),)
        help = "move the rule to that pass, or change the op's `rule`"
        sink.error("SAGE304", message, entry.span(*path, "from_op"), help, related)
        raise Refused
    pattern = tuple(PatternCall(call.targets, ops[call.op], call.args, call.kwargs) for call in op.fuses)
    outputs = tuple(output.name for output in op.outputs)
    attrs = tuple((attr.name, AttrName(attr.name)) for attr in op.attrs)
    inputs = tuple(operand.name for operand in op.inputs)
    return RuleDef(name, pattern, outputs, (PatternCall(outputs, op, inputs, attrs),), op.rule.benefit, path)


def _plain_result(text: Text) -> tuple[str, str] | None:
    """(result, value) of a line `y = x` of a replacement, or None for any other line."""
    match parse_statements(text):
        case [ast.Assign(targets=[ast.Name(id=result)], value=ast.Name(id=value))]:
            return result, value
    return None


def _call(text: Text, ops: Mapping[str, OpDef], bound: Mapping[str, Attr] | None) -> PatternCall:
    """A line of a pattern, or of a replacement, which may compute attrs from those `bound` by the pattern."""
    statements = parse_statements(text)
    match statements:
        case [ast.Assign(targets=[target], value=ast.Call(func=ast.Name(id=name)) as call)]:
            check_grammar(text, statements[0])
        case _:
            message = "a line must have the form `values = op(values, attr=name)`"
            raise text.refuse("SAGE305", message, statements[0], "write one call of an op per line: y = add(a, b)")
    if name not in ops:
        raise text.refuse("SAGE306", f"unknown op '{name}'", call.func, did_you_mean(name, ops))
    op = ops[name]
    return PatternCall(_targets(text, target, op), op, _arguments(text, call, op), _attributes(text, call, op, bound))


def _targets(text: Text, node: ast.expr, op: OpDef) -> tuple[str, ...]:
    names = node.elts if isinstance(node, ast.Tuple) else [node]
    targets = [name.id for name in names if isinstance(name, ast.Name)]
    if len(targets) != len(names):
        help = "write names, separated by commas"
        raise text.refuse("SAGE305", "the left side of `=` must consist of names", node, help)
    if len(targets) != len(op.outputs):
        outputs = ", ".join(output.name for output in op.outputs)
        message = f"{op.name}: expected {_counted(len(op.outputs), 'result')} ({outputs}), got {len(targets)}"
        raise text.refuse("SAGE307", message, node, "write one name per result on the left of `=`")
    return tuple(targets)


def _arguments(text: Text, call: ast.Call, op: OpDef) -> tuple[str, ...]:
    args = [arg.id for arg in call.args if isinstance(arg, ast.Name)]
    required = sum(not operand.optional for operand in op.inputs)
    if len(args) != len(call.args):
        raise text.refuse("SAGE305", "an operand must be a name", call, "write inner calls on lines before")
    if not required <= len(args) <= len(op.inputs):
        inputs = ", ".join(operand.name for operand in op.inputs)
        message = f"{op.name}: expected the operands ({inputs}), got {_counted(len(args), 'operand')}"
        raise text.refuse(
            "SAGE307", message, call, "pass one name per operand; optional ones may be left out at the end"
        )
    return tuple(args)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _attributes(
    text: Text, call: ast.Call, op: OpDef, bound: Mapping[str, Attr] | None
) -> tuple[tuple[str, AttrValue], ...]:
    attrs: list[tuple[str, AttrValue]] = []
    for keyword in call.keywords:
        name = keyword.arg or "**"
        declared = op.attr(name)
        if declared is None:
            known = [attr.name for attr in op.attrs]
            raise text.refuse("SAGE308", f"unknown attr '{name}' of {op.name}", keyword, did_you_mean(name, known))
        match keyword.value:
            case ast.Name(id=value):
                attrs.append((name, AttrName(value)))
            case ast.Constant(value=bool() | int() | float() | str() as value):
                if (why := declared.why_not(value)) is not None:
                    raise text.refuse("SAGE308", why, keyword.value, f"the type of '{name}' is {declared.type}")
                attrs.append((name, value))
            case value if bound is not None and is_formula(value):
                attrs.append((name, link_formula(text, value, bound, declared, "SAGE305")))
            case value:
                help = "formulas belong in `rewrite`" if is_formula(value) else "write a name, a number or a text"
                message = "the value of an attr must be a name or a constant"
                raise text.refuse("SAGE305", message, value, help)
    return tuple(attrs)


def _check_names(rule: RuleDef, entry: Entry[PassSpec], sink: Sink) -> None:
    """Reports names of the replacement that the pattern does not bind, and kept values that it does not produce."""
    path = rule.path
    produced = [target for call in rule.pattern for target in call.targets]
    for name in sorted({name for name in produced if produced.count(name) > 1}):
        message = f"'{name}' must be the result of one line of the pattern only"
        sink.error("SAGE309", message, entry.span(*path, "match"), "use two names")
    values = {*produced, *(arg for call in rule.pattern for arg in call.args if arg)}
    attrs = {value.name for call in rule.pattern for _, value in call.attrs if isinstance(value, AttrName)}
    removed = set(produced)
    for i, call in zip(rule.lines, rule.replacement, strict=True):
        for arg in call.args:
            if arg not in values:
                located = entry.span(*path, "rewrite", i)
                sink.error("SAGE310", f"'{arg}' is not bound by the pattern", located, did_you_mean(str(arg), values))
            elif arg in removed:
                message = f"'{arg}' is computed by the pattern, which the rewrite removes"
                sink.error("SAGE310", message, entry.span(*path, "rewrite", i), "read the inputs of the pattern")
        for _, value in call.attrs:
            if isinstance(value, AttrName) and value.name not in attrs:
                located = entry.span(*path, "rewrite", i)
                message = f"the attr '{value.name}' is not bound by the pattern"
                sink.error("SAGE310", message, located, did_you_mean(value.name, attrs))
        removed -= set(call.targets)
        values |= set(call.targets)
    made = {target for call in rule.replacement for target in call.targets} | {result for result, _ in rule.same}
    _check_plain_results(rule, entry, sink)
    for i, name in enumerate(rule.keep):
        if name not in produced or name not in made:
            by = "pattern" if name not in produced else "rewrite"
            message = f"the kept value '{name}' must be a result of the {by}"
            sink.error("SAGE311", message, entry.span(*path, "keep", i), "produce it there, or remove it from `keep`")
    missing = [name for name in rule.anchor.targets if name not in made]
    if missing:
        message = f"the rewrite must produce '{missing[0]}', the result of the pattern"
        sink.error("SAGE311", message, entry.span(*path, "rewrite"), f"add a line `{missing[0]} = ...`")
    _check_connected(rule, entry, sink)


def _check_plain_results(rule: RuleDef, entry: Entry[PassSpec], sink: Sink) -> None:
    """Reports lines `y = x` of the replacement that do not name a result of the pattern and a value that stays."""
    produced = {target for call in rule.pattern for target in call.targets}
    stays = {arg for call in rule.pattern for arg in call.reads} - produced
    made = [target for call in rule.replacement for target in call.targets]
    positions = [i for i in range(len(rule.lines) + len(rule.same)) if i not in rule.lines]
    for i, (result, value) in zip(positions, rule.same, strict=True):
        span = entry.span(*rule.path, "rewrite", i)
        if result not in produced:
            message = f"expected a result of the pattern, got '{result}'"
            sink.error("SAGE310", message, span, did_you_mean(result, produced))
        elif value not in stays:
            message = f"expected a value that the pattern reads and does not produce, got '{value}'"
            sink.error("SAGE310", message, span, did_you_mean(value, stays))
        elif value in rule.optional:
            sink.error("SAGE310", f"'{value}' may be absent", span, "name a required operand")
        elif [*made, *(other for other, _ in rule.same)].count(result) > 1:
            sink.error("SAGE310", f"'{result}' must be defined by one line", span, "remove the other line")


def _check_connected(rule: RuleDef, entry: Entry[PassSpec], sink: Sink) -> None:
    """Reports calls of the pattern that matching cannot reach along values from the last call, where it starts."""
    found = {len(rule.pattern) - 1, *(step.position for step in rule.search())}
    for i, call in enumerate(rule.pattern):
        if i not in found:
            message = (
                f"the line of '{', '.join(call.targets)}' must share a value with the lines connected to the last one"
            )
            sink.error("SAGE312", message, entry.span(*rule.path, "match", i), "matching starts at the last line")


def _check_rule_passes(raw: RawSpecs, sink: Sink) -> None:
    """Reports rules of ops that the named pass does not list."""
    for name, entry in raw.ops.items():
        if entry.spec.rule is None:
            continue
        pass_name, span = entry.spec.rule.pass_, entry.span("rule", "pass")
        pass_ = raw.passes.get(pass_name)
        if pass_ is None:
            sink.error("SAGE315", f"unknown pass '{pass_name}'", span, did_you_mean(pass_name, raw.passes))
        elif name not in [rule.from_op for rule in pass_.spec.rules]:
            help = f"add `{{from_op: {name}}}` to its rules"
            sink.error("SAGE315", f"the pass '{pass_name}' must list '{name}'", span, help)


# order


def _pipeline(raw: RawSpecs, sink: Sink) -> list[str]:
    """The passes by stage; within a stage in spec order as far as `after` and `before` allow."""
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
        cycle = [a for a, _ in find_cycle(edges)]
        own = [i for i, name in enumerate(cycle) if not raw.is_base(raw.passes[name])]
        cycle = [*cycle[own[0] :], *cycle[: own[0]]] if own else cycle  # an overlay's pass, since the package is sound
        message = f"the order of passes must not be a cycle: {' -> '.join([*cycle, cycle[0]])}"
        sink.error("SAGE319", message, raw.passes[cycle[0]].key_span(), "remove one `after` or `before`")
    return order


def _ordered(names: list[str], edges: list[tuple[str, str]]) -> list[str]:
    """A topological order that keeps the order of `names` where it can; names in a cycle are left out."""
    order: list[str] = []
    waiting = list(names)
    while ready := [name for name in waiting if all(a in order for a, b in edges if b == name)]:
        order.append(ready[0])
        waiting.remove(ready[0])
    return order
