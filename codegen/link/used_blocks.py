"""Config names, checks, test values and divided sizes that come with a block used from another layout."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from sageLLM.codegen.facts import words_of
from sageLLM.codegen.link.config_uses import block_words, expressions_of
from sageLLM.codegen.link.flat_layout import FlatBlock, FlatModel, Located
from sageLLM.codegen.link.patches import normalized
from sageLLM.codegen.schema.models import ConfigField


@dataclass(slots=True)
class Brought:
    """Config names and checks of the layouts that blocks come from."""

    config: dict[str, Located[ConfigField]] = field(default_factory=dict)
    checks: list[Located[str]] = field(default_factory=list)


def bring(used: Mapping[str, FlatModel], flat: FlatModel) -> Brought:
    """What the blocks `used`, by name and with the layout that each comes from, read and the layout lacks.

    Extends the test values and the divided sizes of the layout. A check comes along if it reads only names that the
    block reads.
    """
    brought, own = Brought(), flat.entry.spec.config
    checks = {normalized(text) for text in (*(located.value for located in flat.checks), *flat.entry.spec.checks)}
    for name, source in used.items():
        known = {*flat.config, *own, *brought.config}
        read = _names_read(flat.blocks[name], source, known)
        brought.config.update((one, source.config[one]) for one in read if one not in known)
        for check in source.checks:
            words = words_of([check.value]) & source.config.keys()
            if words and words <= read.keys() and normalized(check.value) not in checks:
                checks.add(normalized(check.value))
                brought.checks.append(check)
        for one in read:
            definition = own.get(one) or (flat.config.get(one) or source.config[one]).value
            _bring_test_value(definition, source.config[one].value, source.tiny, flat.tiny)
        divided = {located.value for located in flat.divides}
        flat.divides += [one for one in source.divides if one.value in read and one.value not in divided]
    return brought


def _names_read(block: FlatBlock, source: FlatModel, known: Container[str]) -> dict[str, None]:
    """The config names that a block reads, in order; also those that definitions read, except for known names."""
    read: set[str] = set()
    pending = block_words(block) & source.config.keys()
    while pending:
        name = pending.pop()
        read.add(name)
        if name not in known:
            pending |= (words_of(expressions_of(source.config[name].value)) & source.config.keys()) - read
    return {name: None for name in source.config if name in read}


def _bring_test_value(
    definition: ConfigField, original: ConfigField, values: Mapping[str, object], tiny: dict[str, object]
) -> None:
    """Sets the test value of a name, under the first key that its definition reads, unless there is one."""
    keys, found = _top_keys(definition), [key for key in _top_keys(original) if key in values]
    if keys and found and not any(key in tiny for key in keys):
        tiny[keys[0]] = values[found[0]]


def _top_keys(definition: ConfigField) -> list[str]:
    """The keys of config.json that a name is read from; those of sections are left out."""
    keys: Iterable[str] = [definition.hf] if isinstance(definition.hf, str) else definition.hf or ()
    return [key for key in keys if "." not in key]
