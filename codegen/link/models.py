"""Links model entries: every name, shape, source and statement of a layout is checked and bound."""

import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.link.blocks import BlockLinker, attends
from sageLLM.codegen.link.config import check_own_names_are_read, link_checks, link_config
from sageLLM.codegen.link.flatten import FlatModel, flatten
from sageLLM.codegen.link.given import Given, GivenLinker
from sageLLM.codegen.link.names import names_read, size_names
from sageLLM.codegen.link.program import ProgramLinker
from sageLLM.codegen.link.scope import FUNCTIONS, Surroundings
from sageLLM.codegen.link.weights import WeightLinker, link_weights
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.layout import (
    PHASES,
    BlockDef,
    Check,
    ConfigName,
    ModelDef,
    Phase,
    Repeat,
    Results,
    Statement,
    WeightDef,
)
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.schema.models import ModelFile

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]{1,80}\Z")
_IGNORED = re.compile(r"\*?[A-Za-z0-9_.-]+\*?\Z")


def link_models(
    raw: RawSpecs, ops: Mapping[str, OpDef], sink: Sink, names: Iterable[str] | None = None
) -> dict[str, ModelDef]:
    """All layouts by name, or those of `names`. Findings go to the sink; a layout with findings is left out."""
    _check_architectures(raw, sink)
    linked: dict[str, ModelDef] = {}
    for name in raw.models if names is None else names:
        entry, own = raw.models[name], Sink()
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
    return bool(_NAME.match(name)) and not keyword.iskeyword(name) and name not in FUNCTIONS


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
        config = link_config(self.flat, size_names(self.flat), taken, self.sink)
        steps = [name for name in self.raw.dims if name not in config]
        divides = self._divides(config)
        given = GivenLinker(self.flat, self.raw, config, self.sink).link(steps)
        inputs = given.inputs
        linker = WeightLinker(config, divides, self.sink)
        own = link_weights(linker, self.flat.weights)
        phases = self._phases()
        attend = self._attend_ops() if phases == PHASES else {}
        around = Surroundings(self.ops, config, inputs, attend, {}, self.sink, frozenset(divides))
        block_linker = BlockLinker(self.flat.entry.name, self.raw, tuple(steps), linker, phases, self.sink)
        blocks = {name: block_linker.link(name, block, around) for name, block in self.flat.blocks.items()}
        around = replace(around, blocks=blocks)
        program, results = ProgramLinker(self.flat, self.sink).link(own, around)
        checks = tuple(link_checks(self.flat, config, self.sink))
        self._check_ignored()
        self._check_prefix([*own.values(), *(w for block in blocks.values() if block for w in block.weights)])
        if not self.sink.diagnostics:  # a misspelt use would show its name as unread, too
            check_own_names_are_read(self.flat, names_read(self.flat, self.raw.passes.values()), self.sink)
        if self.sink.diagnostics:
            return None
        return self._model(config, checks, given, divides, own, blocks, program, results, phases)

    def _model(
        self,
        config: Mapping[str, ConfigName],
        checks: tuple[Check, ...],
        given: Given,
        divides: tuple[str, ...],
        own: Mapping[str, WeightDef],
        blocks: Mapping[str, BlockDef | None],
        program: list[Statement | Repeat],
        results: Results,
        phases: tuple[Phase, ...],
    ) -> ModelDef:
        flat, spec = self.flat, self.flat.entry.spec
        linked = {name: block for name, block in blocks.items() if block is not None}
        return ModelDef(
            name=flat.entry.name,
            entry=flat.entry,
            base=flat.base,
            summary=spec.summary,
            architectures=tuple(spec.hf.architectures),
            prefix=spec.hf.prefix,
            config=config,
            checks=checks,
            ropes=given.ropes,
            alibi=given.alibi,
            cache=given.cache,
            divides=divides,
            weights=tuple(own.values()),
            blocks=linked,
            program=tuple(program),
            returns=tuple(place.value for place in flat.returns),
            results=results,
            phases=phases,
            inputs=given.inputs,
            ignore=tuple(dict.fromkeys(place.value for place in flat.ignore)),
            tiny=flat.tiny | {"architectures": list(spec.hf.architectures[:1])},
            join=self.ops.get("concat_rows"),
        )

    def _divides(self, config: Mapping[str, ConfigName]) -> tuple[str, ...]:
        for place in self.flat.divides:
            if place.value not in config or config[place.value].type != "size":
                sizes = [name for name, found in config.items() if found.type == "size"]
                help = did_you_mean(place.value, sizes)
                self.sink.error("SAGE210", f"'{place.value}' is not a size of this layout", place.span(), help)
        return tuple(place.value for place in self.flat.divides)

    def _phases(self) -> tuple[Phase, ...]:
        """The phases of a step; without a KV cache whole sequences are read at once, which is prefill."""
        return PHASES if any(attends(block) for block in self.flat.blocks.values()) else ("prefill",)

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

    def _check_prefix(self, weights: Iterable[WeightDef]) -> None:
        prefix = self.flat.entry.spec.hf.prefix
        if prefix and not any(part.hf.startswith(prefix) for weight in weights for part in weight.parts):
            span = self.flat.entry.span("hf", "prefix")
            help = "write the first words of the names, with the dot: `prefix: model.`"
            self.sink.error("SAGE212", f"no tensor's name begins with '{prefix}'", span, help)

    def _check_ignored(self) -> None:
        for place in self.flat.ignore:
            if not _IGNORED.match(place.value):
                help = "write a name, with `*` before or after it"
                self.sink.error("SAGE212", f"'{place.value}' cannot name tensors", place.span(), help)
