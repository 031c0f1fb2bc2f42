"""Links the blocks of a layout: arguments, weights, statements, results, and the op type of each phase."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.config_text import INDEX
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused
from sageLLM.codegen.expr.types import ValueType, parse_type
from sageLLM.codegen.link.conditions import Index
from sageLLM.codegen.link.flat_layout import FlatBlock, FlatLine, Located, plain_lines
from sageLLM.codegen.link.scope import FUNCTIONS, LayoutContext, Value, is_value_name
from sageLLM.codegen.link.statements import BodyLinker, check_used, check_value_names
from sageLLM.codegen.link.weights import WeightLinker, link_block_weights
from sageLLM.codegen.load import RawSpecs
from sageLLM.codegen.model.layout import PHASES, BlockDef, ConfigName, Phase

_ATTEND = re.compile(r"[^=]*=\s*attend\s*\(")


def attends(block: FlatBlock) -> bool:
    """Whether the block reads the KV cache."""
    return any(_ATTEND.match(located.value) for located in plain_lines(block.body))


@dataclass(frozen=True, slots=True)
class BlockLinker:
    """Links the blocks of one layout. `steps` are the step's dims that no config name shadows."""

    layout: str
    raw: RawSpecs
    steps: tuple[str, ...]
    weights: WeightLinker
    phases: tuple[Phase, ...]
    sink: Sink

    def link(self, name: str, block: FlatBlock, context: LayoutContext) -> BlockDef | None:
        before = len(self.sink.diagnostics)
        is_taken = name in context.ops or name in FUNCTIONS or name == self.layout
        if not is_value_name(name) or is_taken or name.upper() in self.raw.dims:
            message = (
                f"a block name must be lower case and must not repeat the name of an op, dim or layout, got '{name}'"
            )
            self.sink.error("SAGE204", message, block.located.key_span(), "rename the block")
        for section, content in (("args", block.args), ("body", block.body), ("returns", block.returns)):
            if not content:
                message = f"block '{name}' must have `{section}`"
                self.sink.error("SAGE203", message, block.located.key_span(), f"add `{section}`")
        weights = link_block_weights(self.weights, name, block)
        check_value_names(self.sink, {**block.args, **block.weights})
        args = self._args(block, context.config)
        values = {w: Value(weight.type, weight) for w, weight in weights.items()}
        values |= {arg: Value(args.get(arg)) for arg in block.args}
        values |= {w: Value(None) for w in block.weights if w not in weights}
        body = BodyLinker(context, values, is_block=True, index=Index(INDEX, "layer"))
        linked = body.link_all(block.body)
        statements = tuple(statement for statement in linked if statement is not None)
        results = self._results(name, block, body)
        if None not in linked:
            check_used(self.sink, name, block.weights, weights, body)
        op_types = self._op_types(name, block, attends(block))
        if len(self.sink.diagnostics) > before or None in linked:
            return None
        return BlockDef(
            name=name,
            summary=block.summary or f"The {name} block.",
            op_types=op_types,
            args=args,
            body=statements,
            returns=tuple(located.value for located in block.returns),
            result_types=tuple(value.type for value in results if value.type is not None),
            partial=tuple(value.is_partial for value in results),
            weights=tuple(weights.values()),
            lines=tuple(_source_lines(block.body)),
        )

    def _args(self, block: FlatBlock, config: Mapping[str, ConfigName]) -> dict[str, ValueType]:
        dims = dict.fromkeys([*self.steps, *(name for name, found in config.items() if found.type == "size")])
        args: dict[str, ValueType] = {}
        for name, located in block.args.items():
            try:
                args[name] = parse_type(located.text(located.value, self.sink), {"E": None}, dims)
            except Refused:
                continue
        return args

    def _results(self, name: str, block: FlatBlock, body: BodyLinker) -> list[Value]:
        """The values that the block returns, each with one row per token of the step."""
        found: list[Value] = []
        for located in block.returns:
            value = body.values.get(located.value)
            if value is None or located.value not in body.assigned:
                near = did_you_mean(located.value, body.assigned)
                self.sink.error(
                    "SAGE228", f"expected the result of a statement, got '{located.value}'", located.span(), near
                )
                continue
            type_ = value.type
            if type_ is not None and (
                type_.element != "E" or len(type_.dims) != 2 or type_.dims[0] != Size.symbol("T")
            ):
                message = f"block '{name}' must return one row per token, E[T, ...], got '{located.value}': {type_}"
                self.sink.error("SAGE228", message, located.span(), "return a value with the rows of the step")
            found.append(value)
        partial = {n for n, value in body.values.items() if value.is_partial and n not in body.passed_on}
        partial -= {located.value for located in block.returns}
        for located in plain_lines(block.body):
            target = located.value.partition("=")[0].strip()
            if target in partial:
                message = f"'{target}' is a partial sum over the ranks and is never reduced"
                self.sink.error("SAGE241", message, located.span(), "return it, so that the program reduces it")
        return found

    def _op_types(self, name: str, block: FlatBlock, uses_kv: bool) -> dict[Phase, str]:
        """The op type of each phase. In a hybrid step a block with attention becomes two nodes, one per phase."""
        if block.op_type is None:
            self.sink.error("SAGE203", f"block '{name}' must have `op_type`", block.located.key_span(), "add `op_type`")
            return {}
        declared = block.op_type.value
        by_phase: dict[str, str]
        by_phase = dict.fromkeys(PHASES, declared) if isinstance(declared, str) else dict(declared)
        required: tuple[Phase, ...] = ("prefill", "decode") if uses_kv else self.phases
        for op_type in dict.fromkeys(by_phase.values()):
            if op_type not in self.raw.op_types:
                help = did_you_mean(op_type, self.raw.op_types)
                self.sink.error("SAGE230", f"unknown op type '{op_type}'", block.op_type.span(), help)
        if missing := [phase for phase in required if phase not in by_phase]:
            message = f"block '{name}' must have an op type for the phase '{missing[0]}'"
            self.sink.error("SAGE229", message, block.op_type.span(), "map every phase, or write one op type for all")
            return {}
        return {phase: by_phase[phase] for phase in required}


def _source_lines(body: Iterable[FlatLine]) -> Iterator[str]:
    """The statements as written in the layout; those of a branch are indented below its condition."""
    for item in body:
        if isinstance(item, Located):
            yield item.value
            continue
        for branch in item.branches:
            yield f"when {branch.when.value}:" if branch.when is not None else "otherwise:"
            yield from (f"    {line}" for line in _source_lines(branch.body))
