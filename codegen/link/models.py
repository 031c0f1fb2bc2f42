"""Links model entries: every name, shape, source and statement of a layout is checked and bound."""

import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.expr.types import ValueType, parse_type
from sageLLM.codegen.link.config import REQUIRED_NAMES, check_own_names_are_read, link_checks, link_config
from sageLLM.codegen.link.flatten import FlatBlock, FlatModel, FlatRepeat, Placed, flatten
from sageLLM.codegen.link.statements import BodyLinker, Surroundings, Value, is_value_name
from sageLLM.codegen.link.weights import WeightLinker, link_block_weights, link_size, link_weights
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.layout import (
    PHASES,
    Attend,
    BlockCall,
    BlockDef,
    Check,
    ConfigName,
    InputDef,
    ModelDef,
    OpCall,
    Phase,
    Repeat,
    RopeDef,
    WeightDef,
)
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.schema.models import ConfigField, ModelFile, RepeatSpec, WeightSpec

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_ATTEND = re.compile(r"[^=]*=\s*attend\s*\(")
_FUNCTIONS = frozenset(
    {"models", "program", "weights", "shard_config", "ops", "own_ops", "dims", "num_rows", "call_block"}
)
_ATTR_NAME = re.compile(r"\b\w+\s*=(?!=)")
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]{1,80}\Z")
_IGNORED = re.compile(r"\*?[A-Za-z0-9_.-]+\*?\Z")


def link_models(raw: RawSpecs, ops: Mapping[str, OpDef], sink: Sink) -> dict[str, ModelDef]:
    """All layouts by name. Findings go to the sink; a layout with findings is left out."""
    _check_architectures(raw, sink)
    linked: dict[str, ModelDef] = {}
    for name, entry in raw.models.items():
        own = Sink()
        if not _is_name(name):
            own.error(
                "SAGE204", f"'{name}' cannot name a layout", entry.span("model"), "use small letters, digits and `_`"
            )
        flat = flatten(entry, raw.models, own)
        model = ModelLinker(flat, raw, ops, own).link() if flat is not None else None
        for found in own.diagnostics:
            sink.error(found.code, found.message, found.span, found.help, found.related)
        if model is not None and not own.diagnostics:
            linked[name] = model
    return linked


def _is_name(name: str) -> bool:
    return bool(_NAME.match(name)) and not keyword.iskeyword(name) and name not in _FUNCTIONS


def _check_architectures(raw: RawSpecs, sink: Sink) -> None:
    owners: dict[str, Entry[ModelFile]] = {}
    for entry in raw.models.values():
        for i, architecture in enumerate(entry.spec.hf.architectures):
            span = entry.span("hf", "architectures", i)
            if not _ARCHITECTURE.match(architecture):
                sink.error(
                    "SAGE204", f"'{architecture}' cannot name an architecture", span, "use letters, digits and `_`"
                )
            if architecture in owners:
                first = (f"read by '{owners[architecture].name}'", owners[architecture].span("hf", "architectures"))
                sink.error("SAGE231", f"'{architecture}' has two layouts", span, "name it in one of them", (first,))
            owners.setdefault(architecture, entry)


@dataclass(slots=True)
class ModelLinker:
    """Links one complete layout."""

    flat: FlatModel
    raw: RawSpecs
    ops: Mapping[str, OpDef]
    sink: Sink

    def link(self) -> ModelDef | None:
        taken = {name for name in self.raw.dims if name in {"T", "B", "S", "PG", "BS", "MB", "P", "R", "KV"}}
        config = link_config(self.flat, self._size_names(), taken, self.sink)
        steps = [name for name in self.raw.dims if name not in config]
        divides = self._divides(config)
        rope = self._rope(config)
        inputs = self._inputs(config, steps)
        linker = WeightLinker(config, divides, self.sink)
        own = link_weights(linker, self.flat.weights)
        attend = self._attend_ops()
        around = Surroundings(self.ops, config, inputs, attend, {}, self.sink)
        blocks = {name: self._block(name, block, linker, around, steps) for name, block in self.flat.blocks.items()}
        around = Surroundings(self.ops, config, inputs, attend, blocks, self.sink)
        program = self._program(own, around)
        checks = tuple(link_checks(self.flat, config, self.sink))
        self._check_ignored()
        if not self.sink.diagnostics:  # a misspelt use would show its name as unread, too
            check_own_names_are_read(self.flat, self._names_read(), self.sink)
        if self.sink.diagnostics:
            return None
        return self._model(config, checks, rope, divides, own, blocks, program, inputs)

    def _model(
        self,
        config: Mapping[str, ConfigName],
        checks: tuple[Check, ...],
        rope: RopeDef | None,
        divides: tuple[str, ...],
        own: Mapping[str, WeightDef],
        blocks: Mapping[str, BlockDef | None],
        program: list[OpCall | BlockCall | Repeat],
        inputs: Mapping[str, InputDef],
    ) -> ModelDef:
        flat, spec = self.flat, self.flat.entry.spec
        linked = {name: block for name, block in blocks.items() if block is not None}
        return ModelDef(
            name=flat.entry.name,
            entry=flat.entry,
            base=flat.base,
            summary=spec.summary,
            architectures=tuple(spec.hf.architectures),
            config=config,
            checks=checks,
            rope=rope,
            divides=divides,
            weights=tuple(own.values()),
            blocks=linked,
            program=tuple(program),
            returns=tuple(place.value for place in flat.returns),
            inputs=inputs,
            ignore=tuple(dict.fromkeys(place.value for place in flat.ignore)),
            tiny=flat.tiny | {"architectures": list(spec.hf.architectures[:1])},
            join=self.ops.get("concat_rows"),
        )

    def _size_names(self) -> set[str]:
        """Config names that must be at least 1: those in shapes, and those that the runtime counts with."""
        return _names_in(self._size_texts()) | set(REQUIRED_NAMES)

    def _names_read(self) -> set[str]:
        """The names in all texts that can read a config name."""
        texts = self._size_texts()
        texts += [place.value for place in self.flat.checks]
        texts += [text for place in self.flat.config.values() for text in _default_of(place.value)]
        texts += [text for weight in self._all_weights() for text in _conditions_of(weight)]
        bodies = [block.body for block in self.flat.blocks.values()]
        bodies += [[item] if isinstance(item, Placed) else item.body for item in self.flat.program]
        texts += [_ATTR_NAME.sub("", place.value) for body in bodies for place in body]
        for entry in self.raw.passes.values():
            texts += [str(count) for count in entry.spec.expect.values()]
        return _names_in(texts)

    def _size_texts(self) -> list[str]:
        texts = [place.value for place in self.flat.divides]
        texts += [item.place.value.repeat for item in self.flat.program if isinstance(item, FlatRepeat)]
        texts += [text for weight in self._all_weights() for text in _texts_of(weight)]
        texts += [place.value for block in self.flat.blocks.values() for place in block.args.values()]
        texts += [str(self.flat.rope.value.dim)] if self.flat.rope else []
        return texts

    def _all_weights(self) -> Iterable[WeightSpec]:
        yield from (place.value for place in self.flat.weights.values())
        for block in self.flat.blocks.values():
            yield from (place.value for place in block.weights.values())

    def _divides(self, config: Mapping[str, ConfigName]) -> tuple[str, ...]:
        for place in self.flat.divides:
            if place.value not in config or config[place.value].type != "size":
                sizes = [name for name, found in config.items() if found.type == "size"]
                help = did_you_mean(place.value, sizes)
                self.sink.error("SAGE210", f"'{place.value}' is not a size of this layout", place.span(), help)
        return tuple(place.value for place in self.flat.divides)

    def _rope(self, config: Mapping[str, ConfigName]) -> RopeDef | None:
        place = self.flat.rope
        if place is None:
            return None
        spec = place.value
        keys = [*spec.base.hf, *(spec.scaling.hf if spec.scaling else [])]
        for key in keys:
            if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
                self.sink.error(
                    "SAGE250", f"'{key}' is not a key of config.json", place.span(), "write key or outer.key"
                )
        try:
            dim = (
                Size.of(spec.dim)
                if isinstance(spec.dim, int)
                else link_size(place.text(spec.dim, self.sink, "dim"), config)
            )
        except Refused:
            return None
        if dim != Size.symbol("D"):
            message = f"`rope.dim` is {spec.dim}, but rotation takes the whole head, D"
            help = "write `dim: D`; partial rotary is not there yet"
            self.sink.error("SAGE251", message, place.span("dim"), help)
        scaling = spec.scaling
        return RopeDef(
            tuple(spec.base.hf),
            spec.base.default,
            dim,
            tuple(scaling.hf) if scaling else (),
            tuple(scaling.allow) if scaling else (),
        )

    def _inputs(self, config: Mapping[str, ConfigName], steps: Iterable[str]) -> dict[str, InputDef]:
        """The values that the engine gives, typed in this layout's sizes; one that does not fit is not offered."""
        dims = dict.fromkeys([*steps, *(name for name, found in config.items() if found.type == "size")])
        inputs: dict[str, InputDef] = {}
        for table, is_per_layer in (
            (self.raw.step_inputs, False),
            (self.raw.tables, False),
            (self.raw.layer_inputs, True),
        ):
            for name, entry in table.items():
                text = Text.of(entry.spec, entry, (), self.sink)
                try:
                    inputs[name] = InputDef(name, parse_type(text, {"E": None}, dims), is_per_layer)
                except Refused:
                    continue
        return inputs

    def _attend_ops(self) -> dict[Phase, OpDef]:
        found: dict[Phase, OpDef] = {}
        for phase in PHASES:
            place = self.flat.phases.get(phase)
            if place is None:
                remedy = f"add `{phase}: {{attend: OP}}` under `phases`"
                self.sink.error("SAGE229", f"the phase '{phase}' is not mapped", self.flat.span, remedy)
            elif place.value not in self.ops:
                help = did_you_mean(place.value, [op for op, d in self.ops.items() if d.op_type.endswith("_ATTN")])
                self.sink.error("SAGE221", f"unknown op '{place.value}'", place.span(), help)
            elif phase not in self.ops[place.value].phases:
                phases = ", ".join(self.ops[place.value].phases)
                message = f"'{place.value}' does not serve the phase '{phase}'"
                self.sink.error("SAGE229", message, place.span(), f"its phases are: {phases}")
            else:
                found[phase] = self.ops[place.value]
        return found

    def _block(
        self, name: str, block: FlatBlock, linker: WeightLinker, around: Surroundings, steps: Iterable[str]
    ) -> BlockDef | None:
        before = len(self.sink.diagnostics)
        taken = {*self.ops, *_FUNCTIONS, self.flat.entry.name}
        if not is_value_name(name) or name in taken or name.upper() in self.raw.dims:
            remedy = "use small letters, digits and `_`, and no name of an op, a dim or the layout"
            self.sink.error("SAGE204", f"'{name}' cannot name a block", block.place.key_span(), remedy)
        for section, content in (("args", block.args), ("body", block.body), ("returns", block.returns)):
            if not content:
                message = f"block '{name}' has no `{section}`"
                self.sink.error("SAGE203", message, block.place.key_span(), f"add `{section}`")
        weights = link_block_weights(linker, name, block)
        self._check_value_names({**block.args, **block.weights})
        args = self._args(block, around.config, steps)
        values = {w: Value(weight.type, weight) for w, weight in weights.items()}
        values |= {arg: Value(args.get(arg)) for arg in block.args}
        values |= {w: Value(None) for w in block.weights if w not in weights}
        body = BodyLinker(around, values, is_block=True)
        linked = [body.link(place) for place in block.body]
        statements = tuple(s for s in linked if isinstance(s, OpCall | Attend))
        results = self._results(name, block, body)
        if None not in linked:
            self._check_used(name, block.weights, weights, body)
        op_types = self._op_types(name, block, any(_ATTEND.match(place.value) for place in block.body))
        if len(self.sink.diagnostics) > before or None in linked:
            return None
        return BlockDef(
            name=name,
            summary=block.summary or f"The {name} block.",
            op_types=op_types,
            args=args,
            body=statements,
            returns=tuple(place.value for place in block.returns),
            result_types=tuple(value.type for value in results if value.type is not None),
            partial=tuple(value.is_partial for value in results),
            weights=tuple(weights.values()),
            lines=tuple(place.value for place in block.body),
        )

    def _check_value_names(self, places: Mapping[str, Placed[str] | Placed[WeightSpec]]) -> None:
        for name, place in places.items():
            if not is_value_name(name):
                help = "use small letters, digits and `_`, beginning with a letter"
                self.sink.error("SAGE204", f"'{name}' cannot name a value", place.key_span(), help)

    def _args(self, block: FlatBlock, config: Mapping[str, ConfigName], steps: Iterable[str]) -> dict[str, ValueType]:
        dims = dict.fromkeys([*steps, *(name for name, found in config.items() if found.type == "size")])
        args: dict[str, ValueType] = {}
        for name, place in block.args.items():
            try:
                args[name] = parse_type(place.text(place.value, self.sink), {"E": None}, dims)
            except Refused:
                continue
        return args

    def _results(self, name: str, block: FlatBlock, body: BodyLinker) -> list[Value]:
        """What the block returns; results are rows of the step."""
        found: list[Value] = []
        for place in block.returns:
            value = body.values.get(place.value)
            if value is None or place.value not in body.assigned:
                near = did_you_mean(place.value, body.assigned)
                self.sink.error("SAGE228", f"'{place.value}' is no result of a statement", place.span(), near)
                continue
            type_ = value.type
            if type_ is not None and (
                type_.element != "E" or len(type_.dims) != 2 or type_.dims[0] != Size.symbol("T")
            ):
                message = f"block '{name}' returns '{place.value}', which is {type_}"
                self.sink.error("SAGE228", message, place.span(), "a result has one row per token: E[T, ...]")
            found.append(value)
        partial = {n for n, value in body.values.items() if value.is_partial} - {place.value for place in block.returns}
        for place in block.body:
            target = place.value.partition("=")[0].strip()
            if target in partial:
                message = f"'{target}' is a rank's part of a sum and is never summed"
                self.sink.error("SAGE241", message, place.span(), "return it")
        return found

    def _check_used(
        self,
        block: str | None,
        places: Mapping[str, Placed[WeightSpec]],
        weights: Mapping[str, WeightDef],
        body: BodyLinker,
    ) -> None:
        for name, place in places.items():
            if name in weights and (block, name) not in body.used_weights:
                self.sink.error(
                    "SAGE215", f"the weight '{name}' is never used", place.key_span(), "use it, or remove it"
                )

    def _op_types(self, name: str, block: FlatBlock, uses_kv: bool) -> dict[Phase, str]:
        """The op type per phase; a block with attention is a pair in hybrid and has none there."""
        if block.op_type is None:
            self.sink.error("SAGE203", f"block '{name}' has no `op_type`", block.place.key_span(), "add `op_type`")
            return {}
        given = block.op_type.value
        by_phase: dict[str, str]
        by_phase = {"prefill": given, "decode": given, "hybrid": given} if isinstance(given, str) else dict(given)
        wanted: tuple[Phase, ...] = ("prefill", "decode") if uses_kv else PHASES
        for op_type in dict.fromkeys(by_phase.values()):
            if op_type not in self.raw.op_types:
                help = did_you_mean(op_type, self.raw.op_types)
                self.sink.error("SAGE230", f"unknown op type '{op_type}'", block.op_type.span(), help)
        if missing := [phase for phase in wanted if phase not in by_phase]:
            message = f"block '{name}' has no op type for the phase '{missing[0]}'"
            self.sink.error("SAGE229", message, block.op_type.span(), "map every phase, or give one name")
            return {}
        return {phase: by_phase[phase] for phase in wanted}

    def _program(self, own: Mapping[str, WeightDef], around: Surroundings) -> list[OpCall | BlockCall | Repeat]:
        if not self.flat.program or not self.flat.returns:
            section = "program" if not self.flat.program else "returns"
            self.sink.error("SAGE203", f"the layout has no `{section}`", self.flat.span, f"add `{section}`")
            return []
        self._check_value_names(self.flat.weights)
        values = {name: Value(None) for name in self.flat.weights if name not in own}
        values |= {name: Value(weight.type, weight) for name, weight in own.items() if not weight.is_per_layer}
        body = BodyLinker(around, values, is_block=False)
        per_layer = {name: weight for name, weight in own.items() if weight.is_per_layer}
        program: list[OpCall | BlockCall | Repeat] = []
        has_failed = False
        for item in self.flat.program:
            linked = self._repeat(item, body, per_layer, own) if isinstance(item, FlatRepeat) else body.link(item)
            has_failed = has_failed or linked is None
            if linked is not None and not isinstance(linked, Attend):
                program.append(linked)
        for place in self.flat.returns:
            if place.value not in body.values or place.value not in body.assigned:
                near = did_you_mean(place.value, body.assigned)
                self.sink.error("SAGE228", f"'{place.value}' is no result of a statement", place.span(), near)
        if not has_failed:
            self._check_used(None, self.flat.weights, own, body)
        return program

    def _repeat(
        self, item: FlatRepeat, body: BodyLinker, per_layer: Mapping[str, WeightDef], own: Mapping[str, WeightDef]
    ) -> Repeat | None:
        spec, place = item.place.value, item.place
        if spec.repeat != "L":
            message = f"a program repeats L, the layers, not '{spec.repeat}'"
            self.sink.error("SAGE220", message, place.span("repeat"), "write `repeat: L`")
        if not is_value_name(spec.index):
            self.sink.error("SAGE204", f"'{spec.index}' cannot name the index", place.span("index"), "write `index: i`")
        before = dict(body.values)
        for i, name in enumerate(spec.carry):
            if name not in before or name in own:
                help = did_you_mean(name, body.assigned)
                self.sink.error("SAGE227", f"'{name}' has no value before the loop", place.span("carry", i), help)
        body.values |= {name: Value(weight.type, weight) for name, weight in per_layer.items()}
        count = len(body.assigned)
        linked = [body.link(statement) for statement in item.body]
        changed = body.assigned[count:]
        for i, name in enumerate(spec.carry):
            self._check_closes(name, before, body, place, i)
        for name in dict.fromkeys(changed):
            if name in before and name not in spec.carry:
                self.sink.error(
                    "SAGE227", f"'{name}' changes in the loop but is not carried", place.span("carry"), "carry it"
                )
        body.values = before | {name: body.values[name] for name in spec.carry if name in body.values}
        calls = tuple(s for s in linked if isinstance(s, OpCall | BlockCall))
        self._check_called_once(calls, item)
        if None in linked:
            return None
        return Repeat(spec.repeat, spec.index, tuple(spec.carry), calls)

    def _check_called_once(self, calls: Iterable[OpCall | BlockCall], item: FlatRepeat) -> None:
        names = [call.block for call in calls if isinstance(call, BlockCall)]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                message = f"block '{name}' is called {names.count(name)} times in a layer"
                self.sink.error("SAGE232", message, item.place.span("do"), "give the second call a block of its own")

    def _check_closes(
        self, name: str, before: Mapping[str, Value], body: BodyLinker, place: Placed[RepeatSpec], i: int
    ) -> None:
        first, last = before.get(name), body.values.get(name)
        if first is None or last is None or first.type is None or last.type is None or first.type == last.type:
            return
        message = f"'{name}' is {first.type} before the loop and {last.type} after a turn"
        self.sink.error("SAGE227", message, place.span("carry", i), "a carried value keeps its type")

    def _check_ignored(self) -> None:
        for place in self.flat.ignore:
            if not _IGNORED.match(place.value):
                help = "write a name, with `*` before or after it"
                self.sink.error("SAGE212", f"'{place.value}' cannot name tensors", place.span(), help)


def _names_in(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[A-Za-z]\w*", text)}


def _default_of(field: ConfigField) -> list[str]:
    """The default or constant, if it is an expression."""
    given = field.value if field.hf is None else field.default
    return [given] if isinstance(given, str) and field.type != "str" else []


def _conditions_of(weight: WeightSpec) -> list[str]:
    conditions = (weight.when, weight.tied.when if weight.tied else None)
    return [when for when in conditions if when is not None]


def _texts_of(weight: WeightSpec) -> list[str]:
    texts = [str(dim) for dim in weight.shape]
    if not isinstance(weight.hf, str):
        texts += [str(size) for size in (weight.hf.concat or {}).values()]
        texts += [weight.hf.stack.over] if weight.hf.stack else []
    return texts
