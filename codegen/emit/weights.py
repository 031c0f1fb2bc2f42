"""Writes the weights of a layout: `WeightSpec(...)` with its parts, and `g.weight(...)` with the shape on one rank."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from sageLLM.codegen.emit.expert_weights import NO_EXPERTS, ExpertWeights
from sageLLM.codegen.emit.key_heads import KeyHeads
from sageLLM.codegen.emit.layer_conditions import text_of
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.model.layout import ShardDef, WeightDef
from sageLLM.codegen.model.source import PartDef
from sageLLM.codegen.render import lit

ShowSize = Callable[[Size], str]


@dataclass(frozen=True, slots=True)
class WeightView:
    """A weight for `WeightSpec(...)` and `g.weight(...)`; all texts are Python, with names in quotes.

    `when` is the condition of an optional operand; `exists` is that of the checkpoint's tensors, in layer i.
    """

    name: str
    label: str
    shape: tuple[str, ...]
    local_shape: tuple[str, ...]
    parts: str
    options: tuple[tuple[str, str], ...]
    when: str | None
    exists: str | None


@dataclass(frozen=True, slots=True)
class WeightText:
    """Writes weights; `show` returns a size as Python text, `words` the key of a name in config.json as Python."""

    show: ShowSize
    words: Callable[[str], str]
    exists: Callable[[WeightDef], str | None] = lambda weight: None
    key_heads: KeyHeads | None = None
    experts: ExpertWeights = NO_EXPERTS

    def view(self, weight: WeightDef, index: str) -> WeightView:
        inner = f"{weight.block}.{weight.name}" if weight.block else weight.name
        shape = tuple(self.show(dim) for dim in weight.dims)
        return WeightView(
            weight.name,
            f'f"layers.{{{index}}}.{inner}"' if weight.is_per_layer else lit(inner),
            shape,
            self._local_shape(weight, shape),
            self._parts(weight),
            tuple(self._options(weight)),
            text_of(weight.when, index) if weight.when else None,
            self.exists(weight),
        )

    def _local_shape(self, weight: WeightDef, shape: tuple[str, ...]) -> tuple[str, ...]:
        if self.experts.has(weight):
            return tuple(self.experts.local(text, weight.dims[i], i) for i, text in enumerate(shape))
        return tuple(_share(text, i, weight) for i, text in enumerate(shape))

    def _parts(self, weight: WeightDef) -> str:
        # Stacked parts become a generator expression over `e`, so that 256 experts are one line.
        groups = [(count, list(parts)) for count, parts in groupby(weight.parts, key=lambda part: part.stacked)]
        if len(groups) == 1 and groups[0][0] is not None:
            return f"tuple({self._stack(groups[0][0], groups[0][1])})"
        texts: list[str] = []
        for count, parts in groups:
            texts += map(self._part, parts) if count is None else [f"*({self._stack(count, parts)})"]
        return tuple_text(texts)

    def _stack(self, count: str, parts: list[PartDef]) -> str:
        places = f"stacked({self.words(count)}, c.{count})"
        if len(parts) == 1:
            return f"{self._part(parts[0])} for e in {places}"
        return f"part for e in {places} for part in {tuple_text(map(self._part, parts))}"

    def _part(self, part: PartDef) -> str:
        name = f'f"{part.hf}"' if "{" in part.hf else lit(part.hf)
        args = [name, self._dims(part.shape)]
        at = [self._start(part, dim) for dim in range(len(part.at))]
        while at and at[-1] == "0":
            at.pop()
        if at:
            args.append(f"at={tuple_text(at)}")
        if not part.is_plain:
            args.append(f"view={self._view(part)}")
        if part.is_either:
            args.append("is_either=True")
        return f"Part({', '.join(args)})"

    def _start(self, part: PartDef, dim: int) -> str:
        start = self.show(part.at[dim])
        if part.stacked is None or part.stacked_dim != dim:
            return start
        return "e" if start == "0" else f"e + {start}"

    def _view(self, part: PartDef) -> str:
        take = [f"({axis}, {self.show(start)}, {self.show(stop)})" for axis, start, stop in part.take]
        args = [self._dims(part.axes), tuple_text(map(str, part.order)), self._dims(part.size)]
        return f"View({', '.join(args)}{f', take={tuple_text(take)}' if take else ''})"

    def _dims(self, sizes: Iterable[Size]) -> str:
        return tuple_text(map(self.show, sizes))

    def _options(self, weight: WeightDef) -> Iterator[tuple[str, str]]:
        """Keyword arguments of WeightSpec besides name, shape and parts that differ from the defaults."""
        if weight.shard:
            yield "shard", self._shard(weight)
        if weight.tied_to:
            owner = lit(weight.tied_to)
            yield "tied_to", f"{owner} if {text_of(weight.tied_when)} else None" if weight.tied_when else owner

    def _shard(self, weight: WeightDef) -> str:
        shard = weight.shard
        assert shard is not None, "called for sharded weights only"
        kind = [f"kind={lit(shard.kind)}"] if shard.kind != "rows" else []
        then = [f"then={lit(shard.then)}"] if shard.then else []
        segments = [f"segments={self._dims(shard.segments)}"] if shard.segments else []
        experts = ["experts=True"] if self.experts.has(weight) else []
        return (
            f"Shard({', '.join([str(shard.dim), *kind, *then, *segments, *self._key_heads(weight, shard), *experts])})"
        )

    def _key_heads(self, weight: WeightDef, shard: ShardDef) -> list[str]:
        """The argument with the number of key heads in each segment, if one of them has any."""
        if self.key_heads is None or shard.kind != "rows":
            return []
        found = [self.key_heads.count(segment) for segment in shard.segments or (weight.dims[shard.dim],)]
        return [f"key_heads={tuple_text(f'c.{name}' if name else '0' for name in found)}"] if any(found) else []


def _share(text: str, dim: int, weight: WeightDef) -> str:
    """The size on one rank: divided config names are local already in a rank's config, a vocabulary size is not."""
    is_vocab = weight.shard is not None and weight.shard.kind == "vocab" and weight.shard.dim == dim
    return vocab_share(text) if is_vocab else text


def vocab_share(size: str) -> str:
    """The rows on one rank of a token table with `size` rows, as Python text."""
    return f"vocab_share({size}, c.tp)"


def tuple_text(items: Iterable[str]) -> str:
    """A tuple of Python texts."""
    texts = list(items)
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"
