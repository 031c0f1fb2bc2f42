"""Writes the bodies of builder functions: statements with the weights and inputs that they read."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sageLLM.codegen.emit.builder_views import BodyView, BranchView, CallView, ChoiceView, InputView, StepView
from sageLLM.codegen.emit.expert_weights import LOCAL_EXPERTS, expert_numbers, expert_weights_of
from sageLLM.codegen.emit.key_heads import key_heads_of
from sageLLM.codegen.emit.layer_conditions import layer_condition
from sageLLM.codegen.emit.python_text import mentions
from sageLLM.codegen.emit.weights import WeightText, WeightView, tuple_text, vocab_share
from sageLLM.codegen.expr.config_text import python_text as render_names
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.model.layout import (
    Attend,
    BlockCall,
    Choose,
    InputDef,
    ModelDef,
    OpCall,
    Phase,
    Statement,
    WeightDef,
    plain_statements,
)
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import lit

Plain = OpCall | Attend | BlockCall


@dataclass(frozen=True, slots=True)
class BodyScope:
    """The surroundings of a body: the name of the layer index, the weights in scope, and the names declared outside."""

    index: str
    weights: Sequence[WeightDef]
    declared: frozenset[str] = frozenset()

    def declaring(self, names: set[str]) -> BodyScope:
        return replace(self, declared=self.declared | names)


class BodyWriter:
    """Writes the bodies of one layout. Views of weights and texts of sizes are cached, since bodies share them."""

    def __init__(self, model: ModelDef, specs: Specs) -> None:
        self.model = model
        self.specs = specs
        self._weights = WeightText(
            self.size_text,
            lambda name: model.config[name].key_text,
            self._exists,
            key_heads_of(model),
            expert_weights_of(model),
        )
        self._expert_numbers = expert_numbers(model) if LOCAL_EXPERTS in specs.ops else {}
        self._views: dict[tuple[str | None, str, str], WeightView] = {}
        self._texts: dict[str, str] = {}

    def body(self, statements: Sequence[Statement], scope: BodyScope) -> BodyView:
        """The statements with the weights and inputs that they read directly; branches declare their own."""
        direct = [statement for statement in statements if not isinstance(statement, Choose)]
        read = {name for statement in direct for name in _all_args(statement)}
        weights = tuple(w for w in scope.weights if w.name in read and w.name not in scope.declared)
        inputs = tuple(one for one in self._inputs_of(direct, statements) if one.name not in scope.declared)
        assigned = {target for statement in plain_statements(statements) for target in _targets(statement)}
        inner = scope.declaring({*(w.name for w in weights), *(one.name for one in inputs), *assigned})
        return BodyView(
            tuple(self.weight(weight, scope.index) for weight in weights),
            tuple(self._input(one, scope.index) for one in inputs),
            tuple(self.step(statement, inner) for statement in statements),
        )

    def _inputs_of(self, direct: Sequence[Plain], statements: Sequence[Statement]) -> list[InputDef]:
        """The engine's inputs that every phase reads, in declared order, without names that a statement assigns."""
        assigned = {target for statement in plain_statements(statements) for target in _targets(statement)}
        read = {name for statement in direct for name in _common_args(statement) if name is not None}
        return [one for name, one in self.model.inputs.items() if name in read - assigned]

    def step(self, statement: Statement, scope: BodyScope) -> StepView:
        """One statement as a view."""
        match statement:
            case OpCall():
                return self._op_step(statement, is_program=scope.index != "layer")
            case Attend():
                return StepView(call=self._call(statement.store), branches=self._branches(statement, scope.index))
            case BlockCall():
                results = tuple(
                    (name, self.size_text(type_.dims[1]))
                    for name, type_ in zip(statement.targets, statement.types, strict=True)
                )
                reduce_ = tuple(self._reduce(name, "all_reduce") for name in statement.reduced)
                return StepView(block=statement, results=results, reduce=reduce_)
            case Choose():
                return StepView(
                    choices=tuple(
                        ChoiceView(branch.when.python if branch.when else None, self.body(branch.body, scope))
                        for branch in statement.branches
                    )
                )

    def _op_step(self, call: OpCall, *, is_program: bool) -> StepView:
        # Blocks return partial sums: the program reduces them, where the comm passes see the collective.
        if call.reduce is None or not is_program:
            return StepView(call=self._call(call), then=self._local_experts(call))
        reduce_ = tuple(self._reduce(name, call.reduce) for name in call.targets)
        if call.reduce == "all_gather":
            reduce_ += tuple(self._without_padding(name, call) for name in call.targets)
        if call.shard_op is None:
            return StepView(call=self._call(call), reduce=reduce_)
        table = next(name for name in call.args if name in {weight.name for weight in self.model.weights})
        rows = next(weight for weight in self.model.weights if weight.name == table).dims[0]
        plain, first = self._call(call), f"c.rank * {vocab_share(self.size_text(rows))}"
        function = f"{self.module_of(call.shard_op)}.{call.shard_op.name}"
        sharded = CallView(plain.targets, function, plain.args, (("first", first), *plain.attrs))
        return StepView(call=plain, sharded=sharded, reduce=reduce_)

    def _local_experts(self, call: OpCall) -> tuple[CallView, ...]:
        """Under expert parallelism, the experts that a router has chosen get their numbers on this rank."""
        found = [(name, self._expert_numbers[name]) for name in call.targets if name in self._expert_numbers]
        views = []
        for name, count in found:
            op, own = self.specs.ops[LOCAL_EXPERTS], f"{self.size_text(count)} // c.ep"
            attrs = (("X", own), ("first", f"c.rank * ({own})"), ("name", lit(name)))
            views.append(CallView((name,), f"{self.module_of(op)}.{op.name}", (name,), attrs, when="c.ep > 1"))
        return tuple(views)

    def _reduce(self, name: str, collective: str) -> CallView:
        op = self.specs.ops[collective]
        degree = (("W", "c.tp"),) if op.attr("W") else ()
        attrs = (*degree, ("group", '"tp"'), ("name", lit(name)))
        return CallView((name,), f"{self.module_of(op)}.{op.name}", (name,), attrs)

    def _without_padding(self, name: str, call: OpCall) -> CallView:
        """The gathered logits of the tokens, without those of the rows that pad a sharded table."""
        table = next(one for one in self.model.weights if one.name in call.args and one.shard is not None)
        assert table.shard is not None and table.shard.kind == "vocab", "only logits are gathered"
        size = self.size_text(table.dims[table.shard.dim])
        op = self.specs.ops["first_features"]
        attrs = (("N", size), ("name", lit(name)))
        is_padded = f"({size}) % c.tp" if " " in size else f"{size} % c.tp"
        return CallView((name,), f"{self.module_of(op)}.{op.name}", (name,), attrs, when=is_padded)

    def _branches(self, attend: Attend, index: str) -> tuple[BranchView, ...]:
        """The attention calls, one for the phases of each op; the op of most phases is the `else` branch."""
        by_op: dict[str, list[Phase]] = {}
        for phase, call in attend.by_phase.items():
            by_op.setdefault(call.op.name, []).append(phase)
        groups = sorted(by_op.values(), key=len)
        return tuple(
            BranchView(
                tuple(phases),
                tuple(self._input(one, index) for one in self._inputs_only_in(attend, phases[0])),
                self._call(attend.by_phase[phases[0]]),
            )
            for phases in groups
        )

    def _inputs_only_in(self, attend: Attend, phase: Phase) -> list[InputDef]:
        common = set(_common_args(attend))
        names = [name for name in attend.by_phase[phase].args if name in self.model.inputs and name not in common]
        return [self.model.inputs[name] for name in names if name is not None]

    def _call(self, call: OpCall) -> CallView:
        args = [name if name is not None else "None" for name in call.args]
        while args and args[-1] == "None":  # trailing optional operands default to None
            args.pop()
        targets = [lit(target) for target in call.targets]
        names = ("name", targets[0]) if len(targets) == 1 else ("names", tuple_text(targets))
        return CallView(call.targets, f"{self.module_of(call.op)}.{call.op.name}", tuple(args), (*call.attrs, names))

    def module_of(self, op: OpDef) -> str:
        """The module of the op in the generated builder: the package's ops, or those of the overlay."""
        is_own = self.specs.is_overlay and not self.specs.raw.is_base(op.entry)
        return "own_ops" if is_own else "ops"

    def _input(self, one: InputDef, index: str) -> InputView:
        label = f'f"layers.{{{index}}}.{one.name}"' if one.is_per_layer else lit(one.name)
        dtype = "g.dtype" if one.type.element == "E" else lit(one.type.element)
        return InputView(one.name, label, dtype, tuple(self.size_text(dim) for dim in one.type.dims))

    def weight(self, weight: WeightDef, index: str) -> WeightView:
        """The view of a weight, with `index` as the name of the layer index."""
        key = (weight.block, weight.name, index)
        if key not in self._views:
            self._views[key] = self._weights.view(weight, index)
        return self._views[key]

    def _exists(self, weight: WeightDef) -> str | None:
        """The condition under which the weight's tensors exist: in layer i, or in the whole model."""
        condition = layer_condition(self.model, weight)
        if condition is None or weight.is_per_layer or not mentions(condition, "i"):
            return condition
        return f"any({condition} for i in range(c.L))"

    def size_text(self, size: Size | str) -> str:
        """A size as Python text: config names are fields of `c`, dims of the step are symbols."""
        text = str(size)
        if text not in self._texts:
            node = ast.parse(text, mode="eval").body
            self._texts[text] = render_names(node, lambda name: f"c.{name}" if name in self.model.config else name)
        return self._texts[text]


def layer_texts(body: Sequence[Statement]) -> Iterator[str]:
    """The attrs and conditions of a block that depend on the layer index."""
    for statement in body:
        if isinstance(statement, Choose):
            for branch in statement.branches:
                yield from [branch.when.python] if branch.when is not None and branch.when.index else []
                yield from layer_texts(branch.body)
        elif not isinstance(statement, BlockCall):
            calls = statement.by_phase.values() if isinstance(statement, Attend) else [statement]
            yield from (text for call in calls for _, text in call.attrs if mentions(text, "layer"))


def _all_args(statement: Plain) -> set[str]:
    """The names that the statement reads in any phase."""
    if not isinstance(statement, Attend):
        return {name for name in statement.args if name is not None}
    return {name for call in (statement.store, *statement.by_phase.values()) for name in call.args if name is not None}


def _targets(statement: Plain) -> tuple[str, ...]:
    return (statement.target, *statement.store.targets) if isinstance(statement, Attend) else statement.targets


def _common_args(statement: Plain) -> list[str | None]:
    """The names that the statement reads in every phase."""
    if not isinstance(statement, Attend):
        return list(statement.args)
    calls = list(statement.by_phase.values())
    shared = [name for name in calls[0].args if all(name in call.args for call in calls)]
    return [*statement.store.args, *shared]
