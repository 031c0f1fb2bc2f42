"""Checks the architectures and recipes of GGUF files in format files: keys, names and references among them."""

import re
from collections.abc import Iterator

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.formats import ArchitectureSpec, FormatsFile, FormatSpec
from sageLLM.codegen.source import YamlPath

_KEY = r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*"
_PRODUCT = re.compile(rf"{_KEY}( [*/] {_KEY})*\Z")
_LAYERS = re.compile(r"all|alternating|first (1/)?[1-9][0-9]*")
_STEM = re.compile(r"[a-z][a-z0-9_]*\Z")


def check_architectures(entry: Entry[FormatsFile], sink: Sink) -> bool:
    """Reports findings; returns whether there are none."""
    is_correct = True
    defaults = entry.spec.architecture_defaults
    places: list[tuple[YamlPath, ArchitectureSpec]] = [(("architecture_defaults",), defaults)]
    places += [(("architectures", name), one) for name, one in entry.spec.architectures.items()]
    for place, one in places:
        for path, message, help in _findings(one, defaults, has_model=place[0] == "architectures"):
            sink.error("SAGE604", message, entry.span(*place, *path), help)
            is_correct = False
    return is_correct


def check_recipes(entry: Entry[FormatsFile], sink: Sink) -> bool:
    """Reports recipes with a format that is not written, and with unknown layers; returns whether there are none."""
    is_correct = True
    written = [name for name, one in entry.spec.formats.items() if one.write and one.block]
    for name, recipe in entry.spec.recipes.items():
        used: list[tuple[YamlPath, str]] = [(("matrices",), recipe.matrices)]
        for stem, formats in recipe.tensors.items():
            used += [(("tensors", stem, layers), one) for layers, one in formats.items()]
        for path, one in used:
            place = entry.span("recipes", name, *path)
            if one not in written:
                sink.error("SAGE604", f"'{one}' is not a written format in blocks", place, did_you_mean(one, written))
                is_correct = False
            if path[0] == "tensors" and not _LAYERS.fullmatch(str(path[-1])):
                help = "write `all`, `first 4`, `first 1/8` or `alternating`"
                sink.error("SAGE604", f"expected layers, got '{path[-1]}'", place, help)
                is_correct = False
    return is_correct


def check_incomplete(entry: Entry[FormatsFile], sink: Sink) -> bool:
    """Reports formats in place of another that are not written in smaller blocks; returns whether there are none."""
    is_correct = True
    for name, one in entry.spec.formats.items():
        if one.incomplete is not None:
            other = entry.spec.formats.get(one.incomplete)
            smaller = [key for key, value in entry.spec.formats.items() if value.write and _has_less(value, one)]
            if other is None or one.incomplete not in smaller:
                message = f"'{one.incomplete}' must be a written format in smaller blocks"
                help = did_you_mean(one.incomplete, smaller)
                sink.error("SAGE604", message, entry.span("formats", name, "incomplete"), help)
                is_correct = False
    return is_correct


def _has_less(one: FormatSpec, other: FormatSpec) -> bool:
    own, size = one.sizes.get("B"), other.sizes.get("B")
    return isinstance(own, int) and isinstance(size, int) and own < size


def _findings(
    one: ArchitectureSpec, defaults: ArchitectureSpec, *, has_model: bool
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """The path in the entry, the message and the remedy of each mistake."""
    if has_model and not one.hf:
        yield (), "an architecture must have the class of Hugging Face", "add `hf: LlamaForCausalLM`"
    for key, product in one.keys.items():
        if product is not None and not _PRODUCT.match(product):
            yield ("keys", key), f"expected a key of the metadata or a product, got '{product}'", "write a * b / c"
    for key, source in one.copies.items():
        if not re.fullmatch(_KEY, key) or not re.fullmatch(_KEY, source):
            yield ("copies", key), f"expected two keys of the metadata, got '{key}: {source}'", "write a.b: c.d"
    for key in one.optional:
        if key not in {**defaults.keys, **one.keys}:
            yield ("optional",), f"'{key}' is not one of `keys`", "remove it, or add the key"
    names = {**defaults.names, **one.names}
    owner: dict[str, str] = {}
    for stem, name in names.items():
        if name is not None and owner.setdefault(name, stem) != stem:
            path = ("names", stem if stem in one.names else owner[name])
            yield path, f"'{owner[name]}' and '{stem}' are both '{name}'", "set one of them to null"
        if not _STEM.match(stem):
            yield ("names", stem), f"'{stem}' must be a name without the layer", "write attn_q for blk.0.attn_q.weight"
    for stem, name in one.experts.items():
        if name.count("{e}") != 1:
            yield ("experts", stem), f"expected {{e}} for the expert in '{name}'", "write mlp.experts.{e}.up_proj"
    for stem in one.rows:
        if stem not in names:
            yield ("rows",), f"'{stem}' is not one of `names`", "remove it, or add the name"
