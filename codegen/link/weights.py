"""Links a layout's weights: shapes as sizes, sources that fill them exactly, and what tensor parallelism does."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.types import dim_text, size_of
from sageLLM.codegen.link.flatten import FlatBlock, Placed
from sageLLM.codegen.model.layout import ConfigName, PartDef, ShardDef, WeightDef
from sageLLM.codegen.schema.models import HfSource, WeightSpec

_TENSOR = re.compile(r"(?:[A-Za-z0-9_.-]|\{i\}|\{e\})+\Z")
_OVER = re.compile(r"e in ([A-Za-z][A-Za-z0-9_]*)\Z")


def link_size(text: Text, config: Mapping[str, ConfigName], steps: Mapping[str, object] = {}) -> Size:
    """A size over config names (and the dims of a step, where allowed); raises Refused."""
    node = parse_expression(text)
    known = [name for name, found in config.items() if found.type == "size"]
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id not in known and inner.id not in steps:
            help = did_you_mean(inner.id, [*known, *steps])
            raise text.refuse("SAGE210", f"'{inner.id}' is not a size of this layout", inner, help)
    size = size_of(node, text, dict.fromkeys([*known, *steps]))
    return Size(size.terms, text=dim_text(node))


@dataclass(frozen=True, slots=True)
class WeightLinker:
    """Links weights one by one; a weight with findings is left out."""

    config: Mapping[str, ConfigName]
    divides: tuple[str, ...]
    sink: Sink

    def link(
        self, name: str, place: Placed[WeightSpec], block: str | None, prefix: Placed[str] | None
    ) -> WeightDef | None:
        before = len(self.sink.diagnostics)
        try:
            dims = tuple(self._size(dim, place, "shape", i) for i, dim in enumerate(place.value.shape))
            weight = self._source(name, place, block, dims, f"{prefix.value}." if prefix else "")
        except Refused:
            return None
        if weight is None:
            return None
        weight = replace(weight, shard=self._shard(place, weight), when=self.condition(place, "when"))
        return weight if len(self.sink.diagnostics) == before else None

    def _size(self, dim: int | str, place: Placed[WeightSpec], *path: str | int) -> Size:
        if isinstance(dim, str):
            return link_size(place.text(dim, self.sink, *path), self.config)
        if dim < 1:
            self.sink.error("SAGE210", f"{dim} is not a size", place.span(*path), "sizes are at least 1")
            raise Refused
        return Size.of(dim)

    def _source(
        self, name: str, place: Placed[WeightSpec], block: str | None, dims: tuple[Size, ...], prefix: str
    ) -> WeightDef | None:
        source = place.value.hf if isinstance(place.value.hf, HfSource) else HfSource(transpose=place.value.hf)
        is_plain = source is not place.value.hf
        tied = place.value.tied.to if place.value.tied is not None else None
        weight = WeightDef(name, block, False, dims, (), source.dim, tied_to=tied)
        if source.concat is not None:
            sizes = {hf: self._size(size, place, "hf", "concat", hf) for hf, size in source.concat.items()}
            weight = replace(weight, parts=tuple(PartDef(prefix + hf, size) for hf, size in sizes.items()))
            self._check_concat(place, weight)
        elif source.stack is not None:
            weight = self._stack(place, weight, prefix + source.stack.of, source.stack.over)
        else:
            weight = replace(
                weight, parts=(PartDef(prefix + str(source.transpose), dims[0]),), is_transposed=not is_plain
            )
            if weight.is_transposed and len(dims) != 2:
                message = f"a transposed weight has 2 dims, '{name}' has {len(dims)}"
                self.sink.error("SAGE211", message, place.span("shape"), "give both sizes, or drop `transpose`")
        return self._named(place, weight)

    def _check_concat(self, place: Placed[WeightSpec], weight: WeightDef) -> None:
        if weight.dim >= len(weight.dims):
            message = f"'{weight.name}' has no dim {weight.dim}"
            self.sink.error("SAGE211", message, place.span("hf", "dim"), f"it has {len(weight.dims)} dims, from 0")
            return
        total = sum((part.size for part in weight.parts), Size.of(0))
        if total != weight.dims[weight.dim]:
            message = f"the parts of '{weight.name}' fill {total}, but dim {weight.dim} is {weight.dims[weight.dim]}"
            self.sink.error("SAGE211", message, place.span("hf", "concat"), "let the sizes add up")

    def _stack(self, place: Placed[WeightSpec], weight: WeightDef, hf: str, over: str) -> WeightDef:
        found = _OVER.match(over)
        count = found[1] if found else ""
        if count not in self.config or "{e}" not in hf:
            message = f"a stack runs `over: e in COUNT` on a name with {{e}}, got '{over}' and '{hf}'"
            self.sink.error("SAGE211", message, place.span("hf", "stack"), did_you_mean(count, self.config))
            raise Refused
        if weight.dims[0] != Size.symbol(count):
            message = f"'{weight.name}' stacks {count} tensors, but dim 0 is {weight.dims[0]}"
            self.sink.error("SAGE211", message, place.span("shape", 0), f"write {count}")
        return replace(weight, parts=(PartDef(hf, Size.of(1)),), over=("e", count))

    def _named(self, place: Placed[WeightSpec], weight: WeightDef) -> WeightDef | None:
        for part in weight.parts:
            if not _TENSOR.match(part.hf) or ("{e}" in part.hf) != (weight.over is not None):
                help = "use letters, digits, `.`, `_`, `-`, and {i} for the layer"
                self.sink.error("SAGE212", f"'{part.hf}' cannot name a tensor", place.span("hf"), help)
                return None
        per_layer = {"{i}" in part.hf for part in weight.parts}
        if weight.block is not None and per_layer != {True}:
            message = f"the tensors of '{weight.block}.{weight.name}' do not name their layer"
            self.sink.error("SAGE212", message, place.span("hf"), "put {i} into the block's `hf`")
            return None
        return replace(weight, is_per_layer=True in per_layer)

    def condition(self, place: Placed[Any], *path: str) -> str | None:
        name: Any = place.value
        for step in path:
            name = getattr(name, step)
        if name is None:
            return None
        if name not in self.config or self.config[name].type != "bool":
            flags = [flag for flag, found in self.config.items() if found.type == "bool"]
            self.sink.error(
                "SAGE214", f"'{name}' is not a boolean config name", place.span(*path), did_you_mean(name, flags)
            )
            return None
        return str(name)

    def _shard(self, place: Placed[WeightSpec], weight: WeightDef) -> ShardDef | None:
        spec, span = place.value.tp, place.span("tp") if place.value.tp else place.key_span()
        local = [i for i, dim in enumerate(weight.dims) if self._is_divided(dim)]
        if spec is None or spec.keep is not None:
            if local:
                names = f"dim {local[0]} of '{weight.name}' is {weight.dims[local[0]]}"
                message = f"{names}, which tensor parallelism divides, but `tp` does not say so"
                self.sink.error("SAGE240", message, span, f"write `tp: {{shard: {local[0]}}}`")
            return ShardDef(0, "first", None) if spec is not None else None
        assert spec.shard is not None, "the schema wants one of `shard` and `keep`"
        if spec.shard >= len(weight.dims):
            self.sink.error("SAGE240", f"'{weight.name}' has no dim {spec.shard}", place.span("tp", "shard"))
            return None
        wanted = [] if spec.kind == "vocab" else [spec.shard]
        parts = weight.parts if weight.dim == spec.shard and weight.over is None and not weight.is_transposed else ()
        if local != wanted or (wanted and not all(self._is_divided(part.size) for part in parts)):
            message = f"dim {spec.shard} of '{weight.name}' is not what `tp.divides` divides"
            help = f"`tp.divides` makes these local: {', '.join(self.divides) or 'nothing'}"
            self.sink.error("SAGE240", message, place.span("tp", "shard"), help)
        return ShardDef(spec.shard, spec.kind, spec.then)

    def _is_divided(self, size: Size) -> bool:
        return bool(set(size.symbols) & set(self.divides))


def link_weights(linker: WeightLinker, weights: Mapping[str, Placed[WeightSpec]]) -> dict[str, WeightDef]:
    """The model's own weights; ties are checked once all are known."""
    found = {name: linker.link(name, place, None, None) for name, place in weights.items()}
    linked = {name: weight for name, weight in found.items() if weight is not None}
    for name, place in weights.items():
        tied = place.value.tied
        if tied is None or name not in linked:
            continue
        when = linker.condition(place, "tied", "when") if tied.when is not None else None
        linked[name] = replace(linked[name], tied_when=when)
        owner = linked.get(tied.to)
        if owner is None and tied.to not in weights:
            help = did_you_mean(tied.to, [other for other in weights if other != name])
            linker.sink.error("SAGE213", f"'{name}' is tied to unknown '{tied.to}'", place.span("tied", "to"), help)
        elif owner is not None and (owner.tied_to is not None or owner.dims != linked[name].dims):
            reason = "is itself tied" if owner.tied_to is not None else f"is {owner.type}"
            message = f"'{name}' {linked[name].type} is tied to '{tied.to}', which {reason}"
            linker.sink.error(
                "SAGE213", message, place.span("tied", "to"), "a tied weight has one owner of its own shape"
            )
    return linked


def link_block_weights(linker: WeightLinker, name: str, block: FlatBlock) -> dict[str, WeightDef]:
    """The weights of a block, one set per layer."""
    if block.weights and block.hf is None:
        linker.sink.error(
            "SAGE203", f"block '{name}' has weights but no `hf` prefix", block.place.key_span(), "add `hf`"
        )
        return {}
    found = {w: linker.link(w, place, name, block.hf) for w, place in block.weights.items()}
    for w, place in block.weights.items():
        if place.value.tied is not None:
            linker.sink.error(
                "SAGE213", f"'{name}.{w}' is tied", place.span("tied"), "only the model's own weights can be"
            )
    return {w: weight for w, weight in found.items() if weight is not None}
