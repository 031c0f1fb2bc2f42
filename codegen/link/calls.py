"""Links the lines of `fuses`, which are typed calls of other ops, and derives the cost of the fused op."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.cost import tensor_bytes
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text, check_grammar, parse_statements
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.expr.value_names import why_not_a_value_name
from sageLLM.codegen.link.attr_formulas import how_to_define, is_formula, link_formula
from sageLLM.codegen.load import Entry, fused_names
from sageLLM.codegen.model.binding import Binding, TypeMismatch, bound_calls
from sageLLM.codegen.model.op import Attr, AttrFormula, AttrName, AttrValue, Call, Cost, OpDef, Operand, Scalar
from sageLLM.codegen.schema.ops import OpSpec


def link_calls(
    entry: Entry[OpSpec],
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    attrs: Sequence[Attr],
    ops: Mapping[str, OpDef],
    sink: Sink,
) -> tuple[Call, ...] | None:
    """The typed lines of `fuses`, or None after reporting findings."""
    before = len(sink.diagnostics)
    _check_operand_names(entry, sink)
    linker = CallLinker(entry, {o.name: o.type for o in inputs}, {o.name for o in inputs if o.optional},
                        {a.name: a for a in attrs}, ops, sink)  # fmt: skip
    calls = [call for index, line in enumerate(entry.spec.fuses or []) if (call := linker.line(index, line))]
    if len(sink.diagnostics) == before:
        linker.check_outputs(outputs, calls)
    if len(sink.diagnostics) == before and entry.spec.rule is not None:
        linker.check_rule(calls)
    return tuple(calls) if len(sink.diagnostics) == before else None


def _check_operand_names(entry: Entry[OpSpec], sink: Sink) -> None:
    """Reports operands and attrs with the name of an op that `fuses` calls, which the generated function would hide."""
    for key in ("inputs", "outputs", "attrs"):
        for name in getattr(entry.spec, key).keys() & fused_names(entry):
            message = f"'{name}' is an op that `fuses` calls"
            sink.error("SAGE116", message, entry.key_span(key, name), "choose another name")


@dataclass(slots=True)
class CallLinker:
    """Links the lines of one `fuses` in order."""

    entry: Entry[OpSpec]
    values: dict[str, ValueType]
    optional: set[str]
    attrs: Mapping[str, Attr]
    ops: Mapping[str, OpDef]
    sink: Sink
    refused: set[str] = field(default_factory=set)
    """The results of lines with findings, of unknown type: lines that read them are not checked."""

    def line(self, index: int, line: str) -> Call | None:
        text = Text.of(line, self.entry, ("fuses", index), self.sink)
        body: list[ast.stmt] = []
        try:
            body = parse_statements(text)
            for statement in body:
                check_grammar(text, statement)
            match body:
                case [ast.Assign(targets=[target], value=ast.Call(func=ast.Name()) as call)]:
                    return self._call(text, target, call)
            message = "a line of `fuses` must have the form `results = op(arguments)`"
            raise text.refuse("SAGE102", message, None, "write one call of an op per line: y = add(a, b)")
        except Refused:
            stored = (node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name))
            self.refused |= {node.id for node in stored if isinstance(node.ctx, ast.Store)}
            return None

    def _call(self, text: Text, target: ast.expr, node: ast.Call) -> Call:
        name = cast(ast.Name, node.func).id
        op = self.ops.get(name)
        if name == self.entry.name:
            raise text.refuse(
                "SAGE119", f"'{name}' must not call itself in `fuses`", node.func, "call the ops it is made of"
            )
        if op is None:
            raise text.refuse("SAGE119", f"unknown op '{name}'", node.func, did_you_mean(name, self.ops))
        binding = Binding()
        kwargs = tuple((keyword.arg or "", self._kwarg(text, op, keyword)) for keyword in node.keywords)
        binding.fix(op, kwargs)
        missing = [a.name for a in op.attrs if (a.is_required or a.formula) and a.name not in dict(kwargs)]
        if missing:
            raise text.refuse("SAGE106", f"{name} requires the attr '{missing[0]}'", node, f"add {missing[0]}=...")
        args = self._arguments(text, op, node, binding)
        targets = self._targets(text, op, target, binding)
        return Call(targets, name, args, kwargs, text.value, text.span())

    def _arguments(self, text: Text, op: OpDef, node: ast.Call, binding: Binding) -> tuple[str | None, ...]:
        least = sum(not o.optional for o in op.inputs)
        if not least <= len(node.args) <= len(op.inputs):
            count = str(least) if least == len(op.inputs) else f"{least} to {len(op.inputs)}"
            names = ", ".join(o.name for o in op.inputs)
            raise text.refuse(
                "SAGE106", f"{op.name}: expected {count} inputs, got {len(node.args)}", node, f"its inputs: {names}"
            )
        return tuple(self._argument(text, op, o, arg, binding) for o, arg in zip(op.inputs, node.args, strict=False))

    def _argument(self, text: Text, op: OpDef, operand: Operand, node: ast.expr, binding: Binding) -> str:
        if not isinstance(node, ast.Name):
            help = "assign the expression to a name on its own line"
            raise text.refuse("SAGE102", "an argument must be the name of a value", node, help)
        if node.id in self.refused:
            raise Refused
        if node.id not in self.values:
            raise text.refuse("SAGE104", f"unknown name '{node.id}'", node, did_you_mean(node.id, self.values))
        if node.id in self.optional and not operand.optional:
            message = f"'{node.id}' may be absent, but {op.name} requires {operand.name}"
            raise text.refuse("SAGE131", message, node, f"make '{node.id}' required, or call an op that may omit it")
        try:
            binding.match(operand.type, self.values[node.id])
        except TypeMismatch:
            bound = ", ".join(f"{dim} = {size}" for dim, size in binding.dims.items() if Size.symbol(dim) != size)
            expected = f"{operand.type}{f' with {bound}' if bound else ''}"
            message = f"{op.name}.{operand.name}: expected {expected}, got '{node.id}': {self.values[node.id]}"
            raise text.refuse("SAGE120", message, node, f"see {op.entry.ref}") from None
        return node.id

    def _kwarg(self, text: Text, op: OpDef, node: ast.keyword) -> AttrValue:
        declared = op.attr(node.arg or "")
        if declared is None:
            help = did_you_mean(node.arg or "", [a.name for a in op.attrs])
            raise text.refuse("SAGE106", f"unknown attr '{node.arg}' of {op.name}", node, help)
        match node.value:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return self._constant(text, declared, node.value, value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return self._constant(text, declared, node.value, -value)
            case ast.Name(id="true" | "false" as word):
                return self._constant(text, declared, node.value, word == "true")
            case ast.Name(id=name) if name in self.attrs:
                if self.attrs[name].type != declared.type:
                    actual = f"'{name}': {self.attrs[name].type}"
                    message = f"{op.name}.{declared.name}: expected {declared.type}, got {actual}"
                    raise text.refuse("SAGE120", message, node.value, f"make '{name}' {declared.type}")
                return AttrName(name)
            case ast.Name(id=name):
                raise text.refuse("SAGE104", f"unknown attr '{name}'", node.value, how_to_define(name, self.attrs))
        if is_formula(node.value):
            return link_formula(text, node.value, self.attrs, declared, "SAGE106")
        help = "write an attr of this op, a constant, or a formula of both"
        raise text.refuse("SAGE102", "an attr must be a literal or an attr of the op", node.value, help)

    def _constant(self, text: Text, declared: Attr, node: ast.expr, value: Scalar) -> Scalar:
        if (why := declared.why_not(value)) is not None:
            raise text.refuse("SAGE120", why, node, f"the type of '{declared.name}' is {declared.type}")
        return value

    def _targets(self, text: Text, op: OpDef, target: ast.expr, binding: Binding) -> tuple[str, ...]:
        nodes = target.elts if isinstance(target, ast.Tuple) else [target]
        if len(nodes) != len(op.outputs):
            message = f"{op.name} returns {len(op.outputs)} results, got {len(nodes)} names"
            raise text.refuse("SAGE106", message, target, f"its results: {', '.join(o.name for o in op.outputs)}")
        for node, output in zip(nodes, op.outputs, strict=True):
            if not isinstance(node, ast.Name):
                raise text.refuse("SAGE102", "a result must be a name", node, "write names, separated by commas")
            if node.id in self.values or node.id in self.attrs:
                help = "every name is assigned once; choose a new name"
                raise text.refuse("SAGE111", f"'{node.id}' is already defined", node, help)
            if why := self._why_not_a_result(node.id):
                raise text.refuse("SAGE116", why, node, "choose another name")
            self.values[node.id] = binding.apply(output.type)
        return tuple(cast(ast.Name, node).id for node in nodes)

    def _why_not_a_result(self, name: str) -> str | None:
        if name in fused_names(self.entry):
            return f"'{name}' is an op that `fuses` calls"
        return why_not_a_value_name(name, Scope()) if name not in self.entry.spec.outputs else None

    def check_outputs(self, outputs: Sequence[Operand], calls: Sequence[Call]) -> None:
        written = {target for call in calls for target in call.targets}
        for output in outputs:
            if output.name not in written:
                message = f"the output '{output.name}' is never assigned"
                self.sink.error("SAGE110", message, self.entry.key_span("fuses"), f"add `{output.name} = ...`")
            elif self.values[output.name] != output.type:
                message = f"the output '{output.name}': expected {output.type}, got {self.values[output.name]}"
                span = self.entry.span("outputs", output.name)
                self.sink.error("SAGE109", message, span, f"declare it as {self.values[output.name]}")
        used = {arg for call in calls for arg in call.args} | {o.name for o in outputs}
        for index, call in enumerate(calls):
            if not used & set(call.targets):
                span = self.entry.span("fuses", index)
                self.sink.error(
                    "SAGE127", f"'{call.targets[0]}' is never used", span, "remove the line, or make it an output"
                )

    def check_rule(self, calls: Sequence[Call]) -> None:
        """Reports an attr that only formulas read: rules know attrs from lines that receive them unchanged."""
        values = [value for call in calls for _, value in call.kwargs]
        known = {value.name for value in values if isinstance(value, AttrName)}
        for name in (name for value in values if isinstance(value, AttrFormula) for name in value.names):
            if name not in known:
                message = f"the rule cannot know the attr '{name}', which no line of `fuses` receives unchanged"
                help = f"make '{name}' the attr that a line receives, or remove `rule`"
                self.sink.error("SAGE135", message, self.entry.key_span("attrs", name), help)


def fused_cost(
    calls: Iterable[Call], inputs: Sequence[Operand], outputs: Sequence[Operand], ops: Mapping[str, OpDef]
) -> Cost:
    """The flops of all calls; of their bytes only inputs, read once each, and outputs: the rest stays on chip."""
    types = {o.name: o.type for o in inputs}
    flops = Size.of(0)
    reads: dict[str, Size] = {o.name: Size.of(0) for o in inputs}
    written: dict[str, Size] = {}
    hidden = Size.of(0)
    view_bases: dict[str, str] = {}  # view of an input -> the input
    let: dict[str, str] = {}
    for call, op, binding, pairs in bound_calls(calls, inputs, ops):
        flops += binding.formula(op.cost.flops)
        let |= op.cost.let
        for operand, arg in pairs:
            if (source := view_bases.get(arg, arg)) in reads:
                more = binding.formula(op.cost.read[operand.name])
                is_again = more == reads[source] and source == arg
                reads[source] = reads[source] if is_again else _merged(reads[source], more, tensor_bytes(types[source]))
        if op.is_view and pairs:
            view_bases |= dict.fromkeys(call.targets, view_bases.get(pairs[0][1], pairs[0][1]))
        for output, target in zip(op.outputs, call.targets, strict=True):
            written[target] = binding.formula(op.cost.written[output.name])
        hidden += binding.formula(op.cost.bytes - _sum(op.cost.read.values()) - _sum(op.cost.written.values()))
    kept = {o.name: written[o.name] for o in outputs if o.name in written}
    return Cost(flops, hidden + _sum([*reads.values(), *kept.values()]), let, reads, kept)


def _merged(known: Size, more: Size, whole: Size) -> Size:
    """Reading a whole operand once accounts for every other use of it."""
    return whole if whole in (known, more) else known + more


def _sum(sizes: Iterable[Size]) -> Size:
    return sum(sizes, Size.of(0))
