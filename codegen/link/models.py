"""Links model entries: checks and binds every name, shape, source and statement of a layout."""

import keyword
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.link.blocks import BlockLinker, attends
from sageLLM.codegen.link.checkpoints import check_architectures, check_checkpoint_names, shared_prefix, tiny_config
from sageLLM.codegen.link.config import check_own_names_are_read, link_checks, link_config
from sageLLM.codegen.link.config_uses import braced_names, names_read, size_names
from sageLLM.codegen.link.engine_inputs import EngineInputLinker, EngineInputs
from sageLLM.codegen.link.flat_layout import FlatModel
from sageLLM.codegen.link.flatten import flatten
from sageLLM.codegen.link.interfaces import Interfaces
from sageLLM.codegen.link.program import ProgramLinker
from sageLLM.codegen.link.scope import FUNCTIONS, LayoutContext
from sageLLM.codegen.link.test_config import check_test_config
from sageLLM.codegen.link.weights import WeightLinker, link_weights
from sageLLM.codegen.load import RawSpecs
from sageLLM.codegen.model.layout import (
    PHASES,
    BlockDef,
    Check,
    CheckpointDef,
    ConfigName,
    ModelDef,
    Phase,
    Repeat,
    Results,
    Statement,
    WeightDef,
)
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.schema.models import in_order

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_IGNORED = re.compile(r"\*?(?:[A-Za-z0-9_.-]|\{[A-Za-z]\w*(?:\.\.[A-Za-z]\w*)?\})+\*?\Z")
_UNKNOWN = ("SAGE205", "SAGE210", "SAGE221", "SAGE223")
"""Codes of names that are not defined."""
_STEP_DIMS = frozenset({"T", "B", "S", "PG", "BS", "MB", "P", "R", "KV"})
"""Dims that differ from step to step, which config names must not shadow."""


def link_models(
    raw: RawSpecs,
    ops: Mapping[str, OpDef],
    sink: Sink,
    names: Iterable[str] | None = None,
    link: "LinkModel | None" = None,
) -> dict[str, ModelDef]:
    """All layouts by name, or those in `names`. Findings go to the sink; a layout with findings is left out."""
    check_architectures(raw.models.values(), sink)
    views: dict[str, OpDef] = {}
    chosen = raw.models if names is None else names
    found = {name: (link or link_model)(name, raw, Interfaces(ops, views), sink) for name in chosen}
    return {name: model for name, model in found.items() if model is not None}


LinkModel = Callable[[str, RawSpecs, Interfaces, Sink], ModelDef | None]


def link_model(name: str, raw: RawSpecs, ops: Interfaces, sink: Sink) -> ModelDef | None:
    """One layout.

    Reads the vocabulary, its own entry, those of the layouts that it is made of, and the names in the expectations of
    passes.
    """
    entry, own = raw.models[name], Sink()
    if not _is_name(name):
        help = "use lower-case letters, digits and `_`, at most 32 characters"
        own.error("SAGE204", f"expected a layout name, got '{name}'", entry.span("model"), help)
    flat = flatten(entry, raw.models, own)
    model = ModelLinker(flat, raw, ops, own).link() if flat is not None else None
    # A separate sink, because parts of a layout are left out as soon as this layout has findings, whatever others have.
    for found in own.diagnostics:
        named = [name for name in re.findall(r"'(\w+)'", found.message) if flat and name in flat.dropped]
        if flat is not None and named and found.code in _UNKNOWN:
            # The statement is most often inherited, and sound where it stands.
            cause = ("dropped here", flat.dropped[named[0]])
            help = f"patch the statement, or do not drop '{named[0]}'"
            sink.error(found.code, found.message, found.span, help, (*found.related, cause))
        else:
            sink.error(found.code, found.message, found.span, found.help, found.related)
    return model if not own.diagnostics else None


def _is_name(name: str) -> bool:
    return bool(_NAME.match(name)) and not keyword.iskeyword(name) and name not in FUNCTIONS


@dataclass(slots=True)
class ModelLinker:
    """Links one complete layout."""

    flat: FlatModel
    raw: RawSpecs
    ops: Interfaces
    sink: Sink

    def link(self) -> ModelDef | None:
        config = link_config(self.flat, size_names(self.flat), _STEP_DIMS & self.raw.dims.keys(), self.sink)
        steps = [name for name in self.raw.dims if name not in config]
        divides = self._divides(config)
        provided = EngineInputLinker(self.flat, self.raw, config, self.sink).link(steps)
        inputs = provided.inputs
        linker = WeightLinker(config, divides, self.sink)
        own = link_weights(linker, self.flat.weights)
        phases = self._phases()
        attend = self._attend_ops() if phases == PHASES else {}
        context = LayoutContext(self.ops, config, inputs, attend, {}, self.sink, frozenset(divides))
        block_linker = BlockLinker(self.flat.entry.name, self.raw, tuple(steps), linker, phases, self.sink)
        blocks = {name: block_linker.link(name, block, context) for name, block in self.flat.blocks.items()}
        context = replace(context, blocks=blocks)
        program, results = ProgramLinker(self.flat, self.sink).link(own, context)
        checks = tuple(link_checks(self.flat, config, self.sink))
        self._check_ignored(config)
        check_test_config(self.flat, config, self.sink)
        all_weights = [*own.values(), *(w for block in blocks.values() if block for w in block.weights)]
        check_checkpoint_names(self.flat.entry, all_weights, self.sink)
        if not self.sink.diagnostics:  # after a misspelt use, the name would also be reported as unused
            check_own_names_are_read(self.flat, names_read(self.flat, self.raw.passes.values()), self.sink)
        if self.sink.diagnostics:
            return None
        return self._model(
            config=config,
            checks=checks,
            provided=provided,
            divides=divides,
            own=own,
            blocks=blocks,
            program=program,
            results=results,
            phases=phases,
        )

    def _model(
        self,
        *,
        config: Mapping[str, ConfigName],
        checks: tuple[Check, ...],
        provided: EngineInputs,
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
            sources=flat.sources,
            summary=spec.summary,
            checkpoints=CheckpointDef(
                tuple(spec.hf.architectures),
                spec.hf.root or "",
                spec.hf.flat,
                tuple(spec.hf.model_types),
                spec.hf.prefix or shared_prefix(own.values(), linked.values()),
                spec.hf.outer_prefix,
                {name: in_order(one) for name, one in spec.hf.names.items()},
            ),
            config=config,
            checks=checks,
            ropes=provided.ropes,
            alibi=provided.alibi,
            cache=provided.cache,
            divides=divides,
            weights=tuple(own.values()),
            blocks=linked,
            program=tuple(program),
            returns=tuple(located.value for located in flat.returns),
            results=results,
            phases=phases,
            inputs=provided.inputs,
            ignore=tuple(dict.fromkeys(located.value for located in flat.ignore)),
            tiny=tiny_config(flat.entry, flat.tiny),
            join=self.ops.get("concat_rows"),
        )

    def _divides(self, config: Mapping[str, ConfigName]) -> tuple[str, ...]:
        for located in self.flat.divides:
            if located.value not in config or config[located.value].type != "size":
                sizes = [name for name, found in config.items() if found.type == "size"]
                help = did_you_mean(located.value, sizes)
                self.sink.error(
                    "SAGE210", f"expected a size of this layout, got '{located.value}'", located.span(), help
                )
        return tuple(located.value for located in self.flat.divides)

    def _phases(self) -> tuple[Phase, ...]:
        """The phases of a step; a layout without a KV cache reads whole sequences at once, which is prefill only."""
        return PHASES if any(attends(block) for block in self.flat.blocks.values()) else ("prefill",)

    def _attend_ops(self) -> dict[Phase, OpDef]:
        found: dict[Phase, OpDef] = {}
        for phase in PHASES:
            located = self.flat.phases.get(phase)
            if located is None:
                remedy = f"add `{phase}: {{attend: OP}}` under `phases`"
                self.sink.error(
                    "SAGE229", f"the phase '{phase}' must be mapped to an attention op", self.flat.span, remedy
                )
            elif located.value not in self.ops:
                help = did_you_mean(located.value, [op for op, d in self.ops.items() if d.op_type.endswith("_ATTN")])
                self.sink.error("SAGE221", f"unknown op '{located.value}'", located.span(), help)
            elif phase not in self.ops[located.value].phases:
                phases = ", ".join(self.ops[located.value].phases)
                message = f"expected an op for the phase '{phase}', got '{located.value}'"
                self.sink.error("SAGE229", message, located.span(), f"the phases of '{located.value}': {phases}")
            else:
                found[phase] = self.ops[located.value]
        return found

    def _check_ignored(self, config: Mapping[str, ConfigName]) -> None:
        for located in self.flat.ignore:
            if not _IGNORED.match(located.value):
                help = "write a tensor name, with an optional `*` at its start or end, and config names in braces"
                self.sink.error(
                    "SAGE212", f"expected a tensor name pattern, got '{located.value}'", located.span(), help
                )
            for name in braced_names(located.value):
                if name not in config or config[name].type not in ("size", "int") or config[name].items is not None:
                    near = did_you_mean(name, [one for one, found in config.items() if found.type in ("size", "int")])
                    message = f"expected an integer of this layout in braces, got '{name}'"
                    self.sink.error("SAGE210", message, located.span(), near)
