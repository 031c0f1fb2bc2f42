"""Links a layout's weights: shapes, the checkpoint tensors that fill them exactly, and sharding."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.config_text import INDEX
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused
from sageLLM.codegen.link.conditions import Index, link_condition
from sageLLM.codegen.link.flat_layout import FlatBlock, Located
from sageLLM.codegen.link.segments import derived_segments
from sageLLM.codegen.link.sizes import SizeLinker
from sageLLM.codegen.link.sources import SourceLinker
from sageLLM.codegen.link.tensor_coverage import check_tensor_coverage
from sageLLM.codegen.model.layout import Condition, ConfigName, ShardDef, WeightDef
from sageLLM.codegen.schema.models import ShardSpec, WeightSpec

_TENSOR = re.compile(r"(?:[A-Za-z0-9_.-]|\{i\}|\{e\})+\Z")


@dataclass(frozen=True, slots=True)
class WeightLinker:
    """Links weights one by one; a weight with findings is left out."""

    config: Mapping[str, ConfigName]
    divides: tuple[str, ...]
    sink: Sink

    def link(
        self, name: str, located: Located[WeightSpec], block: str | None, prefix: Located[str] | None
    ) -> WeightDef | None:
        before = len(self.sink.diagnostics)
        try:
            linker = SizeLinker(name, located, self.config, self.sink)
            dims = tuple(linker.size(dim, ("shape", i)) for i, dim in enumerate(located.value.shape))
            weight = self._source(located, linker, block, dims, f"{prefix.value}." if prefix else "")
        except Refused:
            return None
        if weight is None:
            return None
        weight = replace(
            weight, shard=self._shard(located, weight), when=self.condition(located, located.value.when, "when")
        )
        return weight if len(self.sink.diagnostics) == before else None

    def _source(
        self, located: Located[WeightSpec], linker: SizeLinker, block: str | None, dims: tuple[Size, ...], prefix: str
    ) -> WeightDef | None:
        parts = SourceLinker(linker, prefix).parts(located.value.hf, dims, ("hf",))
        tied = located.value.tied.to if located.value.tied is not None else None
        return self._named(located, WeightDef(linker.name, block, False, dims, parts, tied_to=tied))

    def _named(self, located: Located[WeightSpec], weight: WeightDef) -> WeightDef | None:
        for part in weight.parts:
            if not _TENSOR.match(part.hf) or ("{e}" in part.hf) != (part.stacked is not None):
                help = "use letters, digits, `.`, `_`, `-`, and {i} for the layer"
                self.sink.error("SAGE212", f"expected a tensor name, got '{part.hf}'", located.span("hf"), help)
                return None
        per_layer = {"{i}" in part.hf for part in weight.parts}
        if weight.block is not None and per_layer != {True}:
            message = f"the tensor names of '{weight.block}.{weight.name}' must contain {{i}}, the layer"
            self.sink.error("SAGE212", message, located.span("hf"), "add {i} to the block's `hf`")
            return None
        return replace(weight, is_per_layer=True in per_layer)

    def condition(self, located: Located[WeightSpec], text: str | None, *path: str) -> Condition | None:
        """The condition under which a weight exists (or is tied): on the config and, if per-layer, on the layer."""
        if text is None:
            return None
        try:
            return link_condition(located.text(text, self.sink, *path), self.config, Index(INDEX, INDEX))
        except Refused:
            return None

    def _shard(self, located: Located[WeightSpec], weight: WeightDef) -> ShardDef | None:
        spec, span = located.value.tp, located.span("tp") if located.value.tp else located.key_span()
        local = [i for i, dim in enumerate(weight.dims) if self._is_divided(dim)]
        if spec is None or spec.keep is not None:
            if local:
                dim = f"dim {local[0]} of '{weight.name}', {weight.dims[local[0]]},"
                message = f"{dim} is divided by `tp.divides`, so the weight must be sharded along it"
                self.sink.error("SAGE240", message, span, f"write `tp: {{shard: {local[0]}}}`")
            return ShardDef(0, "first", None) if spec is not None else None
        assert spec.shard is not None, "the schema requires one of `shard` and `keep`"
        if spec.shard >= len(weight.dims):
            message = f"`shard` must be a dim of '{weight.name}', 0 to {len(weight.dims) - 1}, got {spec.shard}"
            self.sink.error("SAGE240", message, located.span("tp", "shard"), "count dims from 0")
            return None
        # The vocabulary size stays global in a rank's config, because token ids are global, so `tp.divides` omits it.
        divided = [] if spec.kind == "vocab" else [spec.shard]
        segments = self._segments(located, weight, spec) if local == divided and divided else ()
        if segments is None:
            return None
        if local != divided or not all(map(self._is_divided, segments)):
            message = f"the sharded dim {spec.shard} of '{weight.name}' must be the one that `tp.divides` divides"
            help = f"`tp.divides` lists: {', '.join(self.divides) or 'nothing'}"
            self.sink.error("SAGE240", message, located.span("tp", "shard"), help)
        return ShardDef(spec.shard, spec.kind, spec.then, segments if len(segments) > 1 else ())

    def _segments(self, located: Located[WeightSpec], weight: WeightDef, spec: ShardSpec) -> tuple[Size, ...] | None:
        """The segments of the sharded dim, each of which is divided separately; None after a finding."""
        dim = spec.shard or 0
        if spec.segments is None:
            found = derived_segments(weight.parts, dim, self._is_divided)
            if found is None:
                message = f"`tp` must list the segments of dim {dim} of '{weight.name}', {weight.dims[dim]}"
                help = "write `segments: [SIZE, ...]`, in order; each segment is divided over the ranks"
                self.sink.error("SAGE240", message, located.span("tp"), help)
            return found
        linker = SizeLinker(weight.name, located, self.config, self.sink)
        try:
            segments = [linker.size(size, ("tp", "segments", i)) for i, size in enumerate(spec.segments)]
        except Refused:
            return None
        total = sum(segments, Size.of(0))
        if total != weight.dims[dim]:
            name = f"dim {dim} of '{weight.name}'"
            message = f"the segments must add up to {name}: expected {weight.dims[dim]}, got {total}"
            self.sink.error("SAGE240", message, located.span("tp", "segments"), "change a segment, or the shape")
            return None
        return tuple(segments)

    def _is_divided(self, size: Size) -> bool:
        return bool(set(size.symbols) & set(self.divides))


def link_weights(linker: WeightLinker, weights: Mapping[str, Located[WeightSpec]]) -> dict[str, WeightDef]:
    """The weights outside blocks; ties are checked after all are linked."""
    found = {name: linker.link(name, located, None, None) for name, located in weights.items()}
    linked = {name: weight for name, weight in found.items() if weight is not None}
    if len(linked) == len(found):
        check_tensor_coverage(linked.values(), weights, linker.sink)
    for name, located in weights.items():
        tied = located.value.tied
        if tied is None or name not in linked:
            continue
        when = linker.condition(located, tied.when, "tied", "when")
        linked[name] = replace(linked[name], tied_when=when)
        owner = linked.get(tied.to)
        if owner is None and tied.to not in weights:
            help = did_you_mean(tied.to, [other for other in weights if other != name])
            linker.sink.error("SAGE213", f"unknown weight '{tied.to}'", located.span("tied", "to"), help)
        elif owner is not None and (owner.tied_to is not None or owner.dims != linked[name].dims):
            problem = "which is itself tied" if owner.tied_to is not None else f"which is {owner.type}"
            message = f"'{name}' must be tied to an untied weight {linked[name].type}, got '{tied.to}', {problem}"
            help = "name a weight of the same shape that is not tied"
            linker.sink.error("SAGE213", message, located.span("tied", "to"), help)
    return linked


def link_block_weights(linker: WeightLinker, name: str, block: FlatBlock) -> dict[str, WeightDef]:
    """The weights of a block, one set per layer."""
    if block.weights and block.hf is None:
        message = f"block '{name}' has weights, so it must have an `hf` prefix"
        linker.sink.error("SAGE203", message, block.located.key_span(), "add `hf`")
        return {}
    found = {w: linker.link(w, located, name, block.hf) for w, located in block.weights.items()}
    for w, located in block.weights.items():
        if located.value.tied is not None:
            message = f"only weights outside blocks may be tied, got '{name}.{w}'"
            help = "move both weights out of the block, or remove `tied`"
            linker.sink.error("SAGE213", message, located.span("tied"), help)
    linked = {w: weight for w, weight in found.items() if weight is not None}
    if len(linked) == len(found):
        check_tensor_coverage(linked.values(), block.weights, linker.sink)
    return linked
