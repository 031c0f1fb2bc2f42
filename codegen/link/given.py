"""Links what the engine gives to a layout: the step's inputs, rotary tables, ALiBi slopes, and the KV caches."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.expr.types import ValueType, parse_type
from sageLLM.codegen.link.flatten import FlatModel, Placed
from sageLLM.codegen.link.sizes import link_size
from sageLLM.codegen.load import RawSpecs
from sageLLM.codegen.model.layout import AlibiDef, CacheDef, ConfigName, InputDef, RopeDef
from sageLLM.codegen.schema.models import AlibiSection, CacheSection, RopeSection

_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_TABLE_NAME = re.compile(r"[a-z][a-z0-9_]{0,15}\Z")
_DEFAULT_CACHE = (Size.symbol("Nkv"), Size.symbol("D"))


@dataclass(frozen=True, slots=True)
class Given:
    """The sections, and the values by name that they and specs/inputs.yaml give."""

    ropes: tuple[RopeDef, ...]
    alibi: AlibiDef | None
    cache: CacheDef
    inputs: Mapping[str, InputDef]


@dataclass(frozen=True, slots=True)
class GivenLinker:
    """Links the sections of one layout; one with findings is left out."""

    flat: FlatModel
    raw: RawSpecs
    config: Mapping[str, ConfigName]
    sink: Sink

    def link(self, steps: Iterable[str]) -> Given:
        linked = [self._rope(name, place) for name, place in self.flat.ropes.items()]
        ropes = tuple(rope for rope in linked if rope is not None)
        alibi = self._alibi(self.flat.alibi) if self.flat.alibi else None
        cache = self._cache(self.flat.cache) if self.flat.cache else None
        cache = cache or CacheDef(_DEFAULT_CACHE, _DEFAULT_CACHE, is_shared=False)
        given = [*self._step_inputs(steps), *_tables(ropes, alibi), *_caches(cache)]
        return Given(ropes, alibi, cache, {found.name: found for found in given})

    def _step_inputs(self, steps: Iterable[str]) -> Iterable[InputDef]:
        """Those of specs/inputs.yaml, typed in this layout's sizes; one that does not fit is not offered."""
        dims = dict.fromkeys([*steps, *(name for name, found in self.config.items() if found.type == "size")])
        for name, entry in self.raw.step_inputs.items():
            try:
                type_ = parse_type(Text.of(entry.spec, entry, (), self.sink), {"E": None}, dims)
            except Refused:
                continue
            yield InputDef(name, type_, is_per_layer=False)

    def _rope(self, name: str, place: Placed[RopeSection]) -> RopeDef | None:
        spec, scaling = place.value, place.value.scaling
        if name and not _TABLE_NAME.match(name):
            help = "use small letters, digits and `_`"
            self.sink.error("SAGE204", f"'{name}' cannot name a pair of tables", place.key_span(), help)
            return None
        for key in (*spec.base.hf, *(scaling.hf if scaling else ())):
            if not _KEY.fullmatch(key):
                message = f"'{key}' is not a key of config.json"
                self.sink.error("SAGE250", message, place.span(), "write key or outer.key")
        dim = self._size(place, spec.dim, "dim")
        if dim is None:
            return None
        keys, allow = (tuple(scaling.hf), tuple(scaling.allow)) if scaling else ((), ())
        return RopeDef(name, spec.layout, tuple(spec.base.hf), spec.base.default, dim, keys, allow)

    def _alibi(self, place: Placed[AlibiSection]) -> AlibiDef | None:
        heads, bias = place.value.heads, place.value.max_bias
        sizes = [name for name, found in self.config.items() if found.type == "size"]
        if heads not in sizes:
            message = f"'{heads}' is not a size of this layout"
            self.sink.error("SAGE210", message, place.span("heads"), did_you_mean(heads, sizes))
            return None
        if isinstance(bias, float):
            return AlibiDef(heads, repr(bias))
        numbers = [name for name, found in self.config.items() if found.type in ("size", "int", "float")]
        if bias not in numbers:
            message = f"'{bias}' is no number of this layout's config"
            self.sink.error("SAGE205", message, place.span("max_bias"), did_you_mean(bias, numbers))
            return None
        return AlibiDef(heads, bias)

    def _cache(self, place: Placed[CacheSection]) -> CacheDef | None:
        spec = place.value
        k = [self._size(place, size, "k", i) for i, size in enumerate(spec.k)]
        v = [self._size(place, size, "v", i) for i, size in enumerate(spec.v)]
        match [*k, *v]:
            case [Size() as k_heads, Size() as k_width, Size() as v_heads, Size() as v_width]:
                if spec.v_of and (k_heads != v_heads or not (k_width - v_width).is_never_negative):
                    message = f"a value of [{v_heads}, {v_width}] is no leading part of a key of [{k_heads}, {k_width}]"
                    help = "give both the same heads, and the value a width that the key's width contains"
                    self.sink.error("SAGE253", message, place.span("v_of"), help)
                return CacheDef((k_heads, k_width), (v_heads, v_width), spec.v_of is not None)
        return None

    def _size(
        self, place: Placed[RopeSection] | Placed[CacheSection], given: int | str, *path: str | int
    ) -> Size | None:
        """The size, or None after a finding."""
        if isinstance(given, int):
            if given < 1:
                self.sink.error("SAGE210", f"{given} is not a size", place.span(*path), "sizes are at least 1")
                return None
            return Size.of(given)
        try:
            return link_size(place.text(given, self.sink, *path), self.config)
        except Refused:
            return None


def _tables(ropes: Iterable[RopeDef], alibi: AlibiDef | None) -> Iterable[InputDef]:
    """cos and sin f32[P, dim/2] of every rotary section, slopes f32[heads] of ALiBi."""
    for rope in ropes:
        type_ = ValueType("f32", (Size.symbol("P"), rope.dim.divided_by(2)))
        for table in ("cos", "sin"):
            name = f"{table}_{rope.name}" if rope.name else table
            yield InputDef(name, type_, is_per_layer=False, pairs=rope.layout)
    if alibi is not None:
        yield InputDef("slopes", ValueType("f32", (Size.symbol(alibi.heads),)), is_per_layer=False)


def _caches(cache: CacheDef) -> Iterable[InputDef]:
    """k_cache and v_cache E[PG, BS, heads, width], one pair for every layer."""
    for name, shape in (("k_cache", cache.k), ("v_cache", cache.v)):
        type_ = ValueType("E", (Size.symbol("PG"), Size.symbol("BS"), *shape))
        yield InputDef(name, type_, is_per_layer=True)
