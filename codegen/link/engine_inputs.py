"""Links the values that the engine provides to a layout: step inputs, rotary tables, ALiBi slopes and KV caches."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.config_text import python_text
from sageLLM.codegen.expr.constants import constant
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.expr.types import ValueType, parse_type
from sageLLM.codegen.link.expressions import Names, compile_expression, kind_of
from sageLLM.codegen.link.flat_layout import FlatModel, Located
from sageLLM.codegen.link.sizes import link_size
from sageLLM.codegen.load import RawSpecs
from sageLLM.codegen.model.layout import AlibiDef, CacheDef, ConfigName, InputDef, RopeDef
from sageLLM.codegen.schema.models import AlibiSection, BaseFrequency, CacheSection, RopeSection, in_order

_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_TABLE_NAME = re.compile(r"[a-z][a-z0-9_]{0,15}\Z")
_KEYS_OF_ALL = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
_DEFAULT_CACHE = (Size.symbol("Nkv"), Size.symbol("D"))


@dataclass(frozen=True, slots=True)
class EngineInputs:
    """The linked sections, and all provided values by name: those of the sections and of specs/inputs.yaml."""

    ropes: tuple[RopeDef, ...]
    alibi: AlibiDef | None
    cache: CacheDef
    inputs: Mapping[str, InputDef]


@dataclass(frozen=True, slots=True)
class EngineInputLinker:
    """Links the sections of one layout; a section with findings is left out."""

    flat: FlatModel
    raw: RawSpecs
    config: Mapping[str, ConfigName]
    sink: Sink

    def link(self, steps: Iterable[str]) -> EngineInputs:
        linked = [self._rope(name, located) for name, located in self.flat.ropes.items()]
        ropes = tuple(rope for rope in linked if rope is not None)
        alibi = self._alibi(self.flat.alibi) if self.flat.alibi else None
        cache = self._cache(self.flat.cache) if self.flat.cache else None
        cache = cache or CacheDef(_DEFAULT_CACHE, _DEFAULT_CACHE, is_shared=False)
        inputs = [*self._step_inputs(steps), *_tables(ropes, alibi), *_caches(cache)]
        return EngineInputs(ropes, alibi, cache, {found.name: found for found in inputs})

    def _step_inputs(self, steps: Iterable[str]) -> Iterable[InputDef]:
        """The inputs of specs/inputs.yaml, typed in this layout's sizes; those that cannot be typed are left out."""
        dims = dict.fromkeys([*steps, *(name for name, found in self.config.items() if found.type == "size")])
        for name, entry in self.raw.step_inputs.items():
            try:
                type_ = parse_type(Text.of(entry.spec, entry, (), self.sink), {"E": None}, dims)
            except Refused:
                continue
            yield InputDef(name, type_, is_per_layer=False)

    def _rope(self, name: str, located: Located[RopeSection]) -> RopeDef | None:
        spec, scaling = located.value, located.value.scaling
        if name and not _TABLE_NAME.match(name):
            help = "use lower-case letters, digits and `_`, at most 16 characters"
            self.sink.error("SAGE204", f"expected a name for rotary tables, got '{name}'", located.key_span(), help)
            return None
        frequency = spec.base if isinstance(spec.base, BaseFrequency) else None
        base_keys, keys = (in_order(one.hf if one else None) for one in (frequency, scaling))
        for key in (*base_keys, *keys):
            if not _KEY.fullmatch(key):
                message = f"expected a key of config.json, got '{key}'"
                self.sink.error("SAGE250", message, located.span(), "write key or outer.key")
        dim = self._size(located, spec.dim, "dim")
        if dim is None:
            return None
        allow = tuple(scaling.allow) if scaling else ()
        default = tuple(scaling.default.items()) if scaling and scaling.default else ()
        original = scaling.original if scaling else None
        read = {key.rpartition(".")[2] for found in self.config.values() for key in found.keys}
        return RopeDef(
            name,
            spec.layout,
            base_keys,
            frequency.default if frequency else None,
            dim,
            keys,
            allow,
            default,
            original,
            is_partial="partial_rotary_factor" in read,
            base=self._base(located, str(spec.base)) if frequency is None else "",
            formula=str(spec.base) if frequency is None else "",
            reads_theta=frequency is None and "rope_theta" in read,
            read=self._keys_read_in(keys),
            is_mrope=spec.mrope,
        )

    def _base(self, located: Located[RopeSection], formula: str) -> str:
        """The expression of the base frequency as Python; empty after a finding."""
        text, names = located.text(formula, self.sink, "base"), Names(self.config)
        try:
            node = compile_expression(text, names)
            kind = kind_of(node, text, names)
            if kind.type not in ("int", "float") or kind.is_optional:
                got = f"{kind.type} or null" if kind.is_optional else kind.type
                raise text.refuse("SAGE206", f"the base frequency must be a number, got {got}", None, "use numbers")
            if (base := constant(node)) is not None and base <= 0:
                raise text.refuse("SAGE206", f"the base frequency must be positive, got {base}", None, "e.g. 10000.0")
        except Refused:
            return ""
        return python_text(node)

    def _keys_read_in(self, sections: Sequence[str]) -> tuple[str, ...]:
        """The keys that config names read in these sections, besides those that every layout may read."""
        read = [key.rpartition(".") for found in self.config.values() for key in found.keys]
        keys = dict.fromkeys(key for section, _, key in read if section in sections)
        return tuple(key for key in keys if key not in _KEYS_OF_ALL)

    def _alibi(self, located: Located[AlibiSection]) -> AlibiDef | None:
        heads, bias = located.value.heads, located.value.max_bias
        sizes = [name for name, found in self.config.items() if found.type == "size"]
        if heads not in sizes:
            message = f"expected a size of this layout, got '{heads}'"
            self.sink.error("SAGE210", message, located.span("heads"), did_you_mean(heads, sizes))
            return None
        if isinstance(bias, float):
            return AlibiDef(heads, repr(bias))
        numbers = [name for name, found in self.config.items() if found.type in ("size", "int", "float")]
        if bias not in numbers:
            message = f"expected a number or a numeric config name, got '{bias}'"
            self.sink.error("SAGE205", message, located.span("max_bias"), did_you_mean(bias, numbers))
            return None
        return AlibiDef(heads, bias)

    def _cache(self, located: Located[CacheSection]) -> CacheDef | None:
        spec = located.value
        k = [self._size(located, size, "k", i) for i, size in enumerate(spec.k)]
        v = [self._size(located, size, "v", i) for i, size in enumerate(spec.v)]
        match [*k, *v]:
            case [Size() as k_heads, Size() as k_width, Size() as v_heads, Size() as v_width]:
                if spec.v_of and (k_heads != v_heads or not (k_width - v_width).is_never_negative):
                    shapes = f"[{v_heads}, {v_width}] and [{k_heads}, {k_width}]"
                    message = f"with `v_of: k` the value must be a leading part of the key, got {shapes}"
                    help = "use the same number of heads, and a value width of at most the key's"
                    self.sink.error("SAGE253", message, located.span("v_of"), help)
                return CacheDef((k_heads, k_width), (v_heads, v_width), spec.v_of is not None)
        return None

    def _size(
        self, located: Located[RopeSection] | Located[CacheSection], size: int | str, *path: str | int
    ) -> Size | None:
        """The size, or None after a finding."""
        if isinstance(size, int):
            if size < 1:
                span = located.span(*path)
                self.sink.error("SAGE210", f"a size must be at least 1, got {size}", span, "write a positive number")
                return None
            return Size.of(size)
        try:
            return link_size(located.text(size, self.sink, *path), self.config)
        except Refused:
            return None


def _tables(ropes: Iterable[RopeDef], alibi: AlibiDef | None) -> Iterable[InputDef]:
    """`cos` and `sin` f32[P, dim/2] of every rotary section, `slopes` f32[heads] of ALiBi."""
    for rope in ropes:
        type_ = ValueType("f32", (Size.symbol("P"), rope.dim.divided_by(2)))
        for table in ("cos", "sin"):
            name = f"{table}_{rope.name}" if rope.name else table
            yield InputDef(name, type_, is_per_layer=False, pairs=rope.layout)
    if alibi is not None:
        yield InputDef("slopes", ValueType("f32", (Size.symbol(alibi.heads),)), is_per_layer=False)


def _caches(cache: CacheDef) -> Iterable[InputDef]:
    """`k_cache` and `v_cache` E[PG, BS, heads, width], one pair per layer."""
    for name, shape in (("k_cache", cache.k), ("v_cache", cache.v)):
        type_ = ValueType("E", (Size.symbol("PG"), Size.symbol("BS"), *shape))
        yield InputDef(name, type_, is_per_layer=True)
