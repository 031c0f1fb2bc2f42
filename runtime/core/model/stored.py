"""Adapts a layout to one checkpoint: the names of its tensors, and the tied weights that it stores separately."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.weights import Part, WeightSpec

MAX_SCANNED = 50_000
"""The weights that are searched for ties, a bound for configs that claim any number of layers."""
# Names of the first BERT checkpoints, converted from TensorFlow.
_OLD_SUFFIXES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def is_bare(layout: ModelLayout, names: Iterable[str]) -> bool:
    """Whether the names lack the layout's prefix, as in checkpoints of the model without a head."""
    return bool(layout.prefix) and not any(map(_occurs_in(names), _stored_beginnings(layout, layout.prefix)))


def with_stored_names(layout: ModelLayout, names: Collection[str]) -> ModelLayout:
    """The layout with the tensor names of the checkpoint: other beginnings, and suffixes of old files."""
    beginnings = _beginnings(layout, names)
    outer = layout.outer_prefix
    outer = outer if outer and any(name.startswith(outer) for name in names) else ""
    has_old = any(name.endswith(old) for name in names for old in _OLD_SUFFIXES.values())
    if not beginnings and not outer and not has_old:
        return layout

    def renamed(name: str) -> str:
        old = next((old for old in beginnings if name.startswith(old)), "")
        return beginnings.get(old, "") + name.removeprefix(old)

    def stored(name: str) -> str:
        name = outer + renamed(name)
        return name if name in names else _old_name(name, names)

    def weights(config: Any) -> Iterator[WeightSpec]:
        for spec in layout.weights(config):
            yield replace(spec, parts=tuple(replace(part, name=stored(part.name)) for part in spec.parts))

    # The layout ignores tensors of its own, under their new names, and tensors outside the text model.
    ignore = dict.fromkeys([*layout.ignore, *map(renamed, layout.ignore)])
    return replace(layout, weights=weights, ignore=tuple(ignore))


def _beginnings(layout: ModelLayout, names: Collection[str]) -> dict[str, str]:
    """Beginnings of the layout's tensor names, and those of the checkpoint; the longest first."""
    bare = {layout.prefix} if is_bare(layout, names) else set()
    stored = {name: _stored_beginnings(layout, name) for name in {*layout.renamed} | bare}
    for name in stored:
        if bare and name.startswith(layout.prefix):
            stored[name] = [one.replace(layout.prefix, "", 1) for one in stored[name]]
    occurs = _occurs_in(names)
    found = {name: next(filter(occurs, stored[name]), stored[name][0]) for name in stored}
    return {name: found[name] for name in sorted(found, key=len, reverse=True)}


def _stored_beginnings(layout: ModelLayout, name: str) -> list[str]:
    """The beginnings that tensor names beginning with `name` have in checkpoints, in order of preference."""
    keys = sorted((key for key in layout.renamed if name.startswith(key)), key=len)
    return [stored + name.removeprefix(keys[-1]) for stored in layout.renamed[keys[-1]]] if keys else [name]


def _occurs_in(names: Iterable[str]) -> Callable[[str], bool]:
    names = tuple(names)
    return lambda beginning: any(name.startswith(beginning) for name in names)


def with_stored_shapes(layout: ModelLayout, shapes: Mapping[str, tuple[int, ...] | None]) -> ModelLayout:
    """The layout with the order of dims of the checkpoint, for tensors that have either one. None is unknown."""

    def stored(part: Part) -> Part:
        swapped = (*part.shape[:-2], *part.shape[:-3:-1])
        return replace(part, shape=swapped, view=None) if part.is_either and shapes.get(part.name) == swapped else part

    def weights(config: Any) -> Iterator[WeightSpec]:
        for spec in layout.weights(config):
            is_either = any(part.is_either for part in spec.parts)
            yield replace(spec, parts=tuple(map(stored, spec.parts))) if is_either else spec

    return replace(layout, weights=weights)


def with_stored_ties(
    layout: ModelLayout, config: Any, names: Collection[str], are_equal: Callable[[WeightSpec, WeightSpec], bool]
) -> ModelLayout:
    """The layout with ties as transformers 5 resolves them, by the weights that the checkpoint stores.

    A tied weight with its own, different values is not tied. If it alone is stored, it fills both.
    """
    specs = {spec.name: spec for spec in islice(layout.weights(config), MAX_SCANNED)}
    untied: set[str] = set()
    parts: dict[str, tuple[Part, ...]] = {}
    for spec in specs.values():
        owner = specs.get(spec.tied_to or "")
        if owner is None or not all(part.name in names for part in spec.parts):
            continue
        if not any(part.name in names for part in owner.parts):
            parts[owner.name] = spec.parts
        elif not are_equal(owner, spec):
            untied.add(spec.name)
    return _with_ties(layout, untied, parts) if untied or parts else layout


def _with_ties(layout: ModelLayout, untied: Collection[str], parts: Mapping[str, tuple[Part, ...]]) -> ModelLayout:
    def weights(config: Any) -> Iterator[WeightSpec]:
        for spec in layout.weights(config):
            tied_to = None if spec.name in untied else spec.tied_to
            yield replace(spec, tied_to=tied_to, parts=parts.get(spec.name, spec.parts))

    return replace(layout, weights=weights)


def _old_name(name: str, names: Collection[str]) -> str:
    """The name that old checkpoints have for the tensor, if this one has it."""
    for suffix, old in _OLD_SUFFIXES.items():
        if name.endswith(suffix) and (found := name.removesuffix(suffix) + old) in names:
            return found
    return name
