"""Selects the formats of a quantised checkpoint by its settings; refuses settings that are not understood."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.formats import Format, QuantMethod, Setting
from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError

MAX_PATTERN_LEN = 200
_GROUP_KEYS = ("format", "targets")
_ABSENT: tuple[object, ...] = (None, [], {}, "")
_CLASSES = ("Linear",)


@dataclass(frozen=True, slots=True)
class Choice:
    """A format with its sizes, for the modules in `targets` (all if empty). A size of None is the whole inner dim.

    `activations` is the type of activations that the settings declare, such as int8.
    """

    format: Format
    sizes: Mapping[str, int | None]
    targets: tuple[str, ...] = ()
    activations: str | None = None

    def applies_to(self, module: str) -> bool:
        return not self.targets or any(target in _CLASSES or is_listed(module, [target]) for target in self.targets)


@dataclass(frozen=True, slots=True)
class Quantized:
    """The formats of a checkpoint by module, and the modules that are listed as not quantised, under the key `skip`."""

    method: QuantMethod
    source: str
    choices: tuple[Choice, ...]
    skip: str
    skipped: tuple[str, ...]

    def choice(self, module: str) -> Choice | None:
        """The format of a module; those that a target names come before those of a class."""
        found = [one for one in self.choices if one.applies_to(module)]
        return min(found, key=lambda one: any(target in _CLASSES for target in one.targets), default=None)


def choose_formats(method: QuantMethod, settings: Mapping[str, Any], source: str, folder: Path) -> Quantized:
    """The formats that the settings select. Raises CheckpointError for a key or a value that is not understood."""
    place = f"{folder}: {source}"
    _check_keys(method, settings, place)
    if method.groups is not None:
        groups = settings.get(method.groups)
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(f"{place}: '{method.groups}' must be a mapping with a section, got {shown(groups)}")
        choices = [_choice_of_group(method, settings, groups, name, place) for name in groups]
    else:
        choices = [_choice(method, settings, place)]
    skip = next((key for key in method.skip if settings.get(key)), method.skip[0] if method.skip else "")
    return Quantized(method, source, tuple(choices), skip, _names(settings.get(skip), f"{place}: '{skip}'"))


def is_listed(module: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the module or a module around it: by its path or a part of it, with `*`, or by `re:`."""
    return any(_matches(module, pattern) for pattern in patterns)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return len(pattern) <= MAX_PATTERN_LEN and re.match(pattern[3:], module) is not None
        except re.error:
            return False
    path, parts = module.split("."), pattern.split(".")
    windows = (path[i : i + len(parts)] for i in range(len(path) - len(parts) + 1))
    return any(all(map(fnmatchcase, window, parts)) for window in windows)


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a key; `a.b` is in a section, `a|b` is the first that is present. None for absent or empty ones."""
    for name in key.split("|"):
        value: Any = settings
        for step in name.split("."):
            if isinstance(value, Sequence) and not isinstance(value, str) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                value = value.get(step) if isinstance(value, Mapping) else None
        if value not in _ABSENT:
            return value
    return None


def _choice_of_group(
    method: QuantMethod, settings: Mapping[str, Any], groups: Mapping[str, Any], name: str, source: str
) -> Choice:
    group, place = groups[name], f"{source}: '{method.groups}.{str(name)[:40]}'"
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{place} must be a mapping, got {shown(group)}")
    _check_group_keys(method, group, place)
    own = {**settings, **{key: value for key, value in group.items() if value is not None}}
    targets = _names(group.get("targets"), f"{place}: 'targets'")
    choice = _choice(method, own, place)
    return Choice(choice.format, choice.sizes, targets, _activations(method, own))


def _activations(method: QuantMethod, settings: Mapping[str, Any]) -> str | None:
    """The type in the section of activations, if the method has one."""
    if method.activations is None:
        return None
    bits, kind = (setting(settings, f"{method.activations}.{key}") for key in ("num_bits", "type"))
    return f"{'fp' if kind == 'float' else 'int'}{bits}" if isinstance(bits, int) else None


def _choice(method: QuantMethod, settings: Mapping[str, Any], place: str) -> Choice:
    """The first format with the settings; else the error names what differs from the most similar one."""
    misses = [(one, list(_misses(one, settings))) for one in method.formats]
    for one, missed in misses:
        if not missed:
            return Choice(one, {name: _size(one, name, settings, place) for name in one.sizes})
    key, values = min((missed for _, missed in misses), key=len)[0]
    accepted = sorted({_words(value) for one in method.formats for value in one.when.get(key, values)})
    raise CheckpointError(
        f"{place}: '{key}' must be {' or '.join(accepted)}, got {shown(setting(settings, key))}; "
        f"supported are the formats {', '.join(one.name for one in method.formats)} of {method.name} (docs/formats.md)"
    )


def _misses(one: Format, settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Setting, ...]]]:
    for key, values in one.when.items():
        if not any(_is_equal(setting(settings, key), value) for value in values):
            yield key, values


def _is_equal(value: object, accepted: Setting) -> bool:
    if isinstance(value, str) and isinstance(accepted, str):
        return value.lower() == accepted.lower()
    return type(value) is type(accepted) and value == accepted


def _words(value: Setting) -> str:
    return "absent" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _size(one: Format, name: str, settings: Mapping[str, Any], place: str) -> int | None:
    key = one.sizes[name]
    if isinstance(key, int):
        return key
    value = setting(settings, key)
    if value is None or value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**20:
        raise CheckpointError(f"{place}: '{key}' must be a size from 1 to {2**20}, or -1, got {shown(value)}")
    return value


def _check_keys(method: QuantMethod, settings: Mapping[str, Any], source: str) -> None:
    known = {"quant_method", method.groups, *method.skip, *method.keys, *_keys_of_formats(method)}
    _check_known(settings, known, method, source)


def _check_group_keys(method: QuantMethod, group: Mapping[str, Any], place: str) -> None:
    _check_known(group, {*_GROUP_KEYS, *method.keys, *_keys_of_formats(method)}, method, place)


def _check_known(settings: Mapping[str, Any], known: set[str | None], method: QuantMethod, place: str) -> None:
    names = {name for key in known if key for name in key.split("|")}
    for key, value in _leaves(settings, {name.rpartition(".")[0] for name in names if "." in name}):
        is_item = any(name.startswith(f"{key}.") for name in names)
        if key not in names and not is_item and value not in _ABSENT and value is not False:
            message = f"{place}: the key {quoted(key)} is not understood by the format '{method.name}'"
            raise CheckpointError(f"{message}, and may change values; known are {', '.join(sorted(names))}")


def _leaves(settings: Mapping[str, Any], sections: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys, those inside of known sections included."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, Mapping):
            yield from _leaves(value, sections, f"{key}.")
        else:
            yield key, value


def _keys_of_formats(method: QuantMethod) -> set[str]:
    keys = {key for one in method.formats for key in one.when}
    return keys | {key for one in method.formats for key in one.sizes.values() if isinstance(key, str)}


def _names(value: object, place: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{place} must be a list of names, got {shown(value)}")
    return tuple(value)
