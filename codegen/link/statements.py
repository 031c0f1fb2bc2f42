"""Links the statements of a layout: typed calls of ops, of blocks, and of the `attend` form."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.syntax import Refused, Text, check_grammar, parse_statements
from sageLLM.codegen.link.attend import link_attend
from sageLLM.codegen.link.expressions import FORMS, non_null_where
from sageLLM.codegen.link.flat_layout import FlatBranch, FlatChoose, FlatLine, Located
from sageLLM.codegen.link.scope import Scope, Value, count_words, is_reserved, is_value_name
from sageLLM.codegen.link.sharding import with_reduction
from sageLLM.codegen.model.layout import BlockCall, Branch, Choose, OpCall, Statement, WeightDef
from sageLLM.codegen.model.op import OpDef, Operand
from sageLLM.codegen.schema.models import WeightSpec


@dataclass(slots=True)
class BodyLinker(Scope):
    """Links the statements of one body in order."""

    def link(self, located: Located[str]) -> Statement | None:
        """The statement, or None after a finding; its targets then have unknown types."""
        text = located.text(located.value, self.context.sink)
        targets: list[ast.Name] = []
        try:
            targets, call = self._parse(text)
            statement = self._call(text, targets, call)
        except Refused:
            for target in targets:
                self.assign(target.id, Value(None))
            return None
        return statement

    def link_all(self, items: Iterable[FlatLine]) -> list[Statement | None]:
        """All statements in order, None for those with findings."""
        return [self._choose(item) if isinstance(item, FlatChoose) else self.link(item) for item in items]

    def _choose(self, item: FlatChoose) -> Choose | None:
        """Links each branch with the values defined before; values that all branches assign are defined after it."""
        branches: list[Branch | None] = []
        passed: frozenset[str] = frozenset()  # names that are not null because no earlier branch is taken
        scopes: list[BodyLinker] = []
        for flat in item.branches:
            inner = BodyLinker(self.context, dict(self.values), self.is_block, self.index, self.used_weights)
            inner.undefined, inner.present = dict(self.undefined), self.present | passed
            branches.append(inner.branch(flat))
            passed |= _present(flat, False) if branches[-1] is not None else frozenset()
            inner.passed_on = self.passed_on
            scopes.append(inner)
        self._merge(scopes, is_exhaustive=item.branches[-1].when is None)
        found = tuple(branch for branch in branches if branch is not None)
        return Choose(found) if len(found) == len(branches) else None

    def branch(self, flat: FlatBranch) -> Branch | None:
        """One branch of a `choose`, or None after a finding; names that its condition tests for null are not null."""
        when, is_refused = None, False
        try:
            when = self.condition(flat.when) if flat.when is not None else None
            self.present |= _present(flat, True)
        except Refused:
            is_refused = True
        statements = self.link_all(flat.body)
        linked = tuple(statement for statement in statements if statement is not None and not is_refused)
        return Branch(when, linked) if len(linked) == len(statements) else None

    def _merge(self, scopes: list[BodyLinker], *, is_exhaustive: bool) -> None:
        """Defines the values that every branch assigns with one type, and hides the others."""
        for name in dict.fromkeys(name for scope in scopes for name in scope.assigned):
            values = [scope.values.get(name) for scope in scopes]
            values += [] if is_exhaustive else [self.values.get(name)]
            found = [value for value in values if value is not None]
            is_everywhere = len(found) == len(values)
            reason = _why_undefined(found) if is_everywhere else f"not every branch of the `choose` assigns '{name}'"
            if reason is None:
                first = next((value for value in found if value.type is None), found[0])
                self.assign(name, Value(first.type, is_partial=first.is_partial))
            else:
                self.values.pop(name, None)
                self.undefined[name] = reason

    def _parse(self, text: Text) -> tuple[list[ast.Name], ast.Call]:
        nodes = parse_statements(text)
        check_grammar(text, nodes[0], FORMS)
        targets: list[ast.Name] = []
        call: ast.Call | None = None
        match nodes:
            case [ast.Assign(targets=[ast.Name() as target], value=ast.Call() as value)]:
                targets, call = [target], value
            case [ast.Assign(targets=[ast.Tuple(elts=elements)], value=ast.Call() as value)]:
                targets, call = [element for element in elements if isinstance(element, ast.Name)], value
        if call is None or not targets:
            message = "a statement must have the form `names = op(...)`"
            raise text.refuse("SAGE220", message, None, "write one call per line")
        for target in targets:
            if not is_value_name(target.id):
                raise text.refuse("SAGE204", *name_finding(target.id, target))
        return targets, call

    def _call(self, text: Text, targets: list[ast.Name], call: ast.Call) -> Statement:
        assert isinstance(call.func, ast.Name), "the grammar has calls of names only"
        name = call.func.id
        if name == "attend" and self.is_block:
            return link_attend(self, text, targets, call)
        if name in self.context.blocks and not self.is_block:
            return self._block_call(text, targets, call, name)
        if name not in self.context.ops:
            known = [*self.context.ops, *(["attend"] if self.is_block else self.context.blocks)]
            near = did_you_mean(name, known)
            raise text.refuse("SAGE221", f"unknown op '{name}'", call.func, near)
        op = self.context.ops[name]
        if op.op_type.startswith("COMM_"):
            help = "remove it: collectives follow from `tp` of the weights"
            raise text.refuse("SAGE243", f"a layout must not call collectives, got '{name}'", call.func, help)
        operands = self.operands(text, call, op)
        args = [self.argument(text, node, operand, may_be_partial=True) for node, operand in operands]
        attrs = self.attrs(text, call, op)
        linked, parts = self._op_call(text, tuple(target.id for target in targets), op, args, attrs, call)
        self.assign_all(text, targets, linked.types, call, is_partial=False)
        for target in parts:
            self.values[target] = replace(self.values[target], is_partial=True)
        return linked

    def _check_pairs(self, text: Text, op: OpDef, args: list[str], call: ast.Call) -> None:
        """Refuses rotary tables of one pairing of components in an op of the other pairing."""
        for node, name in zip(call.args, args, strict=True):
            table = self.context.inputs.get(name) if name not in self.values else None
            others = {"half", "interleaved"} & set(op.tags) - {table.pairs if table else None}
            if table is not None and table.pairs is not None and others:
                expected = f"a table of `layout: {others.pop()}`"
                message = f"{op.name}: expected {expected}, got '{name}' of `layout: {table.pairs}`"
                matching = [found.name for found in self.context.ops.values() if table.pairs in found.tags]
                raise text.refuse("SAGE252", message, node, f"call {' or '.join(matching)}, or change `rope.layout`")

    def _op_call(
        self,
        text: Text,
        targets: tuple[str, ...],
        op: OpDef,
        args: list[str],
        attrs: list[tuple[str, str]],
        call: ast.Call,
    ) -> tuple[OpCall, tuple[str, ...]]:
        """The call, and its targets that are partial sums, which the program reduces after the block."""
        self._check_pairs(text, op, args, call)
        names = [*args, *[None] * (len(op.inputs) - len(args))]
        types = self.infer(text, op, names, dict(attrs), call, lambda type_: type_)
        linked = OpCall(targets, op, tuple(names), tuple(attrs), types)
        linked, parts = with_reduction(self, text, linked, call)
        return linked, parts if self.is_block else ()  # results of calls in the program are reduced at once

    def _block_call(self, text: Text, targets: list[ast.Name], call: ast.Call, name: str) -> BlockCall:
        block = self.context.blocks[name]
        if block is None:
            raise Refused
        if call.keywords or len(call.args) != len(block.args):
            expected = f"{count_words(len(block.args), len(block.args))} ({', '.join(block.args)})"
            message = f"block '{name}': expected {expected}, got {len(call.args) + len(call.keywords)}"
            raise text.refuse("SAGE222", message, call, "pass the arguments by position")
        args: list[str] = []
        for node, (arg, declared) in zip(call.args, block.args.items(), strict=True):
            args.append(self.argument(text, node, Operand(arg, declared)))
            type_ = self.type_of(args[-1])
            if type_ is None:
                raise Refused
            if type_ != declared:
                message = f"block '{name}', argument '{arg}': expected {declared}, got '{args[-1]}': {type_}"
                raise text.refuse("SAGE224", message, node, f"pass {declared}, or change `args` of the block")
        self.assign_all(text, targets, block.result_types, call, is_partial=False)
        names = tuple(target.id for target in targets)
        reduced = tuple(name for name, is_partial in zip(names, block.partial, strict=True) if is_partial)
        return BlockCall(names, name, tuple(args), block.result_types, reduced)


def _present(branch: FlatBranch, is_taken: bool) -> frozenset[str]:
    """The config names that are not null if a branch is taken, or if it is not taken."""
    try:
        tree = ast.parse(branch.when.value if branch.when is not None else "true", mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()  # reported with the condition
    return non_null_where(tree.body, is_taken)


def _why_undefined(values: list[Value]) -> str | None:
    """Why the values of the branches cannot be used as one value, or None."""
    types = list(dict.fromkeys(str(value.type) for value in values if value.type is not None))
    if len(types) > 1:
        return f"the branches of the `choose` assign different types: {' and '.join(types)}"
    if len({value.is_partial for value in values}) > 1 and all(value.type is not None for value in values):
        return "it is a partial sum in some branches of the `choose` only"
    return None


def name_finding(name: str, node: ast.Name | None = None) -> tuple[str, ast.Name | None, str]:
    """The finding about a name that values cannot have."""
    if is_reserved(name):
        return f"the name '{name}' is reserved", node, "choose another name: generated code uses this one"
    help = "use lower-case letters, digits and `_`, beginning with a letter"
    return f"expected a value name, got '{name}'", node, help


def check_value_names(sink: Sink, specs: Mapping[str, Located[str] | Located[WeightSpec]]) -> None:
    """Reports names that values cannot have."""
    for name, located in specs.items():
        if not is_value_name(name):
            message, _, help = name_finding(name)
            sink.error("SAGE204", message, located.key_span(), help)


def check_used(
    sink: Sink,
    block: str | None,
    specs: Mapping[str, Located[WeightSpec]],
    weights: Mapping[str, WeightDef],
    body: BodyLinker,
) -> None:
    """Reports weights that no statement reads."""
    for name, located in specs.items():
        if name in weights and (block, name) not in body.used_weights:
            sink.error("SAGE215", f"the weight '{name}' is never used", located.key_span(), "use it or remove it")
