"""Collects the config names that a layout reads, and those that are sizes.

The texts are searched by pattern before they are linked, because the type of a config name depends on its uses.
"""

import re
from collections.abc import Iterable

from sageLLM.codegen.facts import words_of
from sageLLM.codegen.link.config import REQUIRED_NAMES
from sageLLM.codegen.link.flat_layout import FlatBlock, FlatLine, FlatModel, FlatRepeat, conditions, plain_lines
from sageLLM.codegen.link.sizes import size_texts
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.models import ConfigField, WeightSpec
from sageLLM.codegen.schema.passes import PassSpec

_DIM_ATTR = re.compile(r"\b[A-Z]\w*\s*=(?!=)([^,()]+)")  # attrs that are dims begin with a capital letter
_ATTR_NAME = re.compile(r"\b\w+\s*=(?!=)")
_CALL = re.compile(r"\b\w+\s*\(")


def size_names(flat: FlatModel) -> set[str]:
    """Config names that must be at least 1: those in shapes, and those that the runtime requires."""
    return words_of(_size_texts(flat)) | set(REQUIRED_NAMES)


def names_read(flat: FlatModel, passes: Iterable[Entry[PassSpec]]) -> set[str]:
    """The names in all texts that may read a config name."""
    texts = _size_texts(flat)
    texts += [located.value for located in flat.checks]
    texts += [name for located in flat.ignore for name in braced_names(located.value)]
    texts += [str(flat.alibi.value.max_bias)] if flat.alibi else []
    texts += [str(located.value.base) for located in flat.ropes.values() if isinstance(located.value.base, str)]
    texts += [text for located in flat.config.values() for text in expressions_of(located.value)]
    texts += [text for weight in _all_weights(flat) for text in _conditions_of(weight)]
    texts += _body_texts(flat.program)
    texts += [text for block in flat.blocks.values() for text in _body_texts(block.body)]
    for entry in passes:
        texts += entry.spec.expect
    return words_of(texts)


def block_words(block: FlatBlock) -> set[str]:
    """The names in all texts of a block that may read a config name."""
    weights = [located.value for located in block.weights.values()]
    texts = [text for weight in weights for text in (*size_texts(weight), *_conditions_of(weight))]
    texts += [located.value for located in block.args.values()]
    return words_of([*texts, *(_CALL.sub("(", text) for text in _body_texts(block.body))])


def _body_texts(body: "Iterable[FlatLine | FlatRepeat]") -> list[str]:
    body = list(body)
    texts = [_ATTR_NAME.sub("", located.value) for located in plain_lines(body)]
    return texts + [located.value for located in conditions(body)]


def braced_names(pattern: str) -> list[str]:
    """The config names in a pattern of ignored tensors, such as `model.layers.{L}.*` or `model.layers.{L..N}.*`."""
    return [name for inner in re.findall(r"\{([\w.]+)\}", pattern) for name in inner.split("..")]


def _size_texts(flat: FlatModel) -> list[str]:
    texts = [located.value for located in flat.divides]
    texts += [item.located.value.repeat for item in flat.program if isinstance(item, FlatRepeat)]
    texts += [text for weight in _all_weights(flat) for text in size_texts(weight)]
    texts += [located.value for block in flat.blocks.values() for located in block.args.values()]
    texts += [str(located.value.dim) for located in flat.ropes.values()]
    texts += [flat.alibi.value.heads] if flat.alibi else []
    texts += [str(size) for size in (*flat.cache.value.k, *flat.cache.value.v)] if flat.cache else []
    bodies: list[list[FlatLine | FlatRepeat]] = [[*block.body] for block in flat.blocks.values()]
    for body in (*bodies, flat.program):
        texts += [size for located in plain_lines(body) for size in _DIM_ATTR.findall(located.value)]
    return texts


def _all_weights(flat: FlatModel) -> Iterable[WeightSpec]:
    yield from (located.value for located in flat.weights.values())
    for block in flat.blocks.values():
        yield from (located.value for located in block.weights.values())


def expressions_of(field: ConfigField) -> list[str]:
    """The default, the value of a null key, and the constant, as far as they are expressions."""
    raws = (field.value, field.default, field.if_null)
    return [raw for raw in raws if isinstance(raw, str) and field.type != "str"]


def _conditions_of(weight: WeightSpec) -> list[str]:
    conditions = (weight.when, weight.tied.when if weight.tied else None)
    return [when for when in conditions if when is not None]
