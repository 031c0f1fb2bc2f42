"""Links the program of a layout: its statements in order, the loop over the layers, and its carried values."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.link.conditions import Index
from sageLLM.codegen.link.flat_layout import FlatModel, FlatRepeat, Located
from sageLLM.codegen.link.results import ResultLinker
from sageLLM.codegen.link.scope import LayoutContext, Value, is_value_name
from sageLLM.codegen.link.statements import BodyLinker, check_used, check_value_names
from sageLLM.codegen.model.layout import BlockCall, Choose, Repeat, Results, Statement, WeightDef
from sageLLM.codegen.schema.models import RepeatSpec


@dataclass(frozen=True, slots=True)
class ProgramLinker:
    """Links the program of one layout."""

    flat: FlatModel
    sink: Sink

    def link(self, own: Mapping[str, WeightDef], context: LayoutContext) -> tuple[list[Statement | Repeat], Results]:
        """The statements, and the roles of the results."""
        if not self.flat.program or not self.flat.returns:
            section = "program" if not self.flat.program else "returns"
            self.sink.error("SAGE203", f"the layout must have `{section}`", self.flat.span, f"add `{section}`")
            return [], Results(None, None)
        check_value_names(self.sink, self.flat.weights)
        values = {name: Value(None) for name in self.flat.weights if name not in own}
        values |= {name: Value(weight.type, weight) for name, weight in own.items() if not weight.is_per_layer}
        body = BodyLinker(context, values, is_block=False)
        per_layer = {name: weight for name, weight in own.items() if weight.is_per_layer}
        program: list[Statement | Repeat] = []
        has_failed = False
        for item in self.flat.program:
            linked: Statement | Repeat | None
            if isinstance(item, FlatRepeat):
                linked = self._repeat(item, body, per_layer, own)
            else:
                (linked,) = body.link_all([item])
            has_failed = has_failed or linked is None
            if linked is not None:
                program.append(linked)
        results = ResultLinker(self.flat, body, self.sink).link()
        if not has_failed:
            check_used(self.sink, None, self.flat.weights, own, body)
            if not self.sink.diagnostics:  # a misspelt call is reported already
                self._check_called(program)
        return program, results

    def _check_called(self, program: Iterable[Statement | Repeat]) -> None:
        """Reports blocks that the program never calls: a checkpoint's tensors for them would be refused as unused."""
        called = {name for item in program for name in _calls(item.body if isinstance(item, Repeat) else [item])}
        for name, block in self.flat.blocks.items():
            if name not in called:
                own = block.located.entry is self.flat.entry
                help = "call it in the program" if own else f"drop it: `drop: {{blocks: {{{name}: null}}}}`"
                span = block.located.key_span() if own else self.flat.entry.key_span("model")
                self.sink.error("SAGE215", f"the block '{name}' is never called", span, help)

    def _repeat(
        self, item: FlatRepeat, body: BodyLinker, per_layer: Mapping[str, WeightDef], own: Mapping[str, WeightDef]
    ) -> Repeat | None:
        spec, located = item.located.value, item.located
        if spec.repeat != "L":
            message = f"`repeat` must be L, the number of layers, got '{spec.repeat}'"
            self.sink.error("SAGE220", message, located.span("repeat"), "write `repeat: L`")
        if not is_value_name(spec.index):
            message = f"expected a name for the layer index, got '{spec.index}'"
            self.sink.error("SAGE204", message, located.span("index"), "write `index: i`")
        before = dict(body.values)
        for i, name in enumerate(spec.carry):
            if name not in before or name in own:
                help = did_you_mean(name, body.assigned)
                message = f"the carried value '{name}' must be assigned before the loop"
                self.sink.error("SAGE227", message, located.span("carry", i), help)
        body.values |= {name: Value(weight.type, weight) for name, weight in per_layer.items()}
        count = len(body.assigned)
        body.index = Index(spec.index, spec.index)
        linked = body.link_all(item.body)
        body.index = None
        changed = body.assigned[count:]
        for i, name in enumerate(spec.carry):
            self._check_closes(name, before, body, located, i)
        for name in dict.fromkeys(changed):
            if name in before and name not in spec.carry:
                message = f"'{name}' is reassigned in the loop, so it must be carried"
                self.sink.error("SAGE227", message, located.span("carry"), f"add '{name}' to `carry`, or rename it")
        # Only carried values leave the loop: the others would be those of the last layer.
        body.values = before | {name: body.values[name] for name in spec.carry if name in body.values}
        calls = tuple(statement for statement in linked if statement is not None)
        self._check_called_once(calls, item)
        if None in linked:
            return None
        return Repeat(spec.repeat, spec.index, tuple(spec.carry), calls)

    def _check_called_once(self, calls: Iterable[Statement], item: FlatRepeat) -> None:
        for name, count in _calls(calls).items():
            if count > 1:
                message = f"block '{name}' must be called once per layer, got {count} calls"
                self.sink.error("SAGE232", message, item.located.span("do"), "define another block for the second call")

    def _check_closes(
        self, name: str, before: Mapping[str, Value], body: BodyLinker, located: Located[RepeatSpec], i: int
    ) -> None:
        first, last = before.get(name), body.values.get(name)
        if name in body.undefined:
            message = f"the carried value '{name}' is undefined at the end of the loop: {body.undefined[name]}"
            self.sink.error("SAGE227", message, located.span("carry", i), "assign it in every branch")
        if first is None or last is None or first.type is None or last.type is None or first.type == last.type:
            return
        message = f"the carried value '{name}' must keep its type: {first.type} before the loop, {last.type} at its end"
        help = "assign it a value of the first type at the end of `do`"
        self.sink.error("SAGE227", message, located.span("carry", i), help)


def _calls(body: Iterable[Statement]) -> Counter[str]:
    """The largest number of calls of each block on any path; a layer takes one branch of each `choose`."""
    counts: Counter[str] = Counter()
    for statement in body:
        if isinstance(statement, BlockCall):
            counts[statement.block] += 1
        elif isinstance(statement, Choose):
            most: Counter[str] = Counter()
            for branch in statement.branches:
                most |= _calls(branch.body)
            counts += most
    return counts
