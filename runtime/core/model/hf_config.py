"""Typed access to a Hugging Face config.json, with fallback keys and errors that name the file, key and value.

An absent key has the default of the checkpoint's config class. A null key is null where the class allows it, and
refused elsewhere. Keys may be dotted: `rope_parameters.rope_theta` is `rope_theta` inside `rope_parameters`; a null
inside an object counts as absent. Where the keys of the text model are in a section of the file, such as `text_config`,
`/tie_word_embeddings` is a key outside the section.
"""

from __future__ import annotations

import builtins
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.printable import quoted

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 100_000
_NEW_ROPE, _OLD_ROPE = "rope_parameters", "rope_scaling"
V = TypeVar("V")


class _Required:
    """The default of a required key."""


REQUIRED: Final = _Required()


_EXPECTED: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class HFConfig:
    """The JSON object of a config file, or a section of one; `path` names the file, and the section, in errors.

    `file` is the whole file. Methods are named after the types that layouts use, which hides the builtins inside the
    class.
    """

    def __init__(
        self, data: Mapping[builtins.str, Any], path: builtins.str = "config.json", file: HFConfig | None = None
    ) -> None:
        self.data, self.path = data, path
        self.file: HFConfig = file if file is not None else self
        self.read_keys: dict[builtins.str, builtins.str] = {}
        """First key of a config name -> the fallback that was read instead, which errors name."""

    def section(self, key: builtins.str, *, is_flat_allowed: builtins.bool = False) -> HFConfig:
        """The object under `key`, from which the text model is read.

        With `is_flat_allowed`, a file without that key has the keys of the section at its top level.
        """
        value = self._value(key)
        if value is None and is_flat_allowed:
            return self
        if not isinstance(value, Mapping):
            raise self._error(key, "an object with the config of the text model", value)
        return HFConfig(value, f"{self.path} ({key})", self)

    def size(
        self, key: builtins.str, *fallbacks: builtins.str, default: builtins.int | _Required = REQUIRED
    ) -> builtins.int:
        """A size: an integer of at least 1."""
        value = self.int(key, *fallbacks, default=default)
        if not 1 <= value <= MAX_SIZE:
            raise self._error(self._key_read(key, fallbacks), f"a size of 1 to {MAX_SIZE}", value)
        return value

    def int(
        self, key: builtins.str, *fallbacks: builtins.str, default: builtins.int | _Required = REQUIRED
    ) -> builtins.int:
        """An integer; true and false are rejected."""
        return self._read((key, *fallbacks), default, builtins.int, "an integer")

    def float(
        self, key: builtins.str, *fallbacks: builtins.str, default: builtins.float | _Required = REQUIRED
    ) -> builtins.float:
        """A finite number; integers are accepted."""
        found = self._find((key, *fallbacks))
        if found is None:
            return self._default((key, *fallbacks), default, "a number")
        name, value = found
        is_number = isinstance(value, (builtins.int, builtins.float)) and not isinstance(value, builtins.bool)
        if not is_number or not _fits_float(value):
            raise self._error(name, "a finite number", value)
        self._require_equal(name, value, [other for other in fallbacks if other != name], default)
        return builtins.float(value)

    def bool(
        self, key: builtins.str, *fallbacks: builtins.str, default: builtins.bool | _Required = REQUIRED
    ) -> builtins.bool:
        """true or false."""
        return self._read((key, *fallbacks), default, builtins.bool, "true or false")

    def str(
        self, key: builtins.str, *fallbacks: builtins.str, default: builtins.str | _Required = REQUIRED
    ) -> builtins.str:
        """Text."""
        return self._read((key, *fallbacks), default, builtins.str, "text")

    def opt_int(self, key: builtins.str, *fallbacks: builtins.str) -> builtins.int | None:
        """An integer, or None if the key is absent or null."""
        return None if self._find((key, *fallbacks)) is None else self.int(key, *fallbacks)

    def opt_float(self, key: builtins.str, *fallbacks: builtins.str) -> builtins.float | None:
        """A finite number, or None if the key is absent or null."""
        return None if self._find((key, *fallbacks)) is None else self.float(key, *fallbacks)

    def mapping(self, key: builtins.str, *fallbacks: builtins.str) -> Mapping[builtins.str, Any] | None:
        """A JSON object, or None if the key is absent or null."""
        found = self._find((key, *fallbacks))
        if found is not None and not isinstance(found[1], Mapping):
            raise self._error(found[0], "an object", found[1])
        return None if found is None else found[1]

    def list(self, key: builtins.str, *fallbacks: builtins.str) -> builtins.list[Any] | None:
        """A JSON array, or None if the key is absent or null."""
        found = self._find((key, *fallbacks))
        if found is not None and not isinstance(found[1], builtins.list):
            raise self._error(found[0], "a list", found[1])
        return None if found is None else found[1]

    def has(self, *keys: builtins.str) -> builtins.bool:
        """Whether one of the keys is present and not null."""
        return self._find(keys) is not None

    def has_items(self, *keys: builtins.str) -> builtins.bool:
        """Whether one of the keys is present, not null and not an empty list, which means the default in a config."""
        found = self._find(keys)
        return found is not None and found[1] != []

    def is_null(self, *keys: builtins.str) -> builtins.bool:
        """Whether one of the keys is null, and the others are absent or null."""
        return not self.has(*keys) and self._null_key(keys) is not None

    def is_text(self, text: builtins.str, *keys: builtins.str) -> builtins.bool:
        """Whether the first of the keys that is present and not null has this text."""
        found = self._find(keys)
        return found is not None and found[1] == text

    def _null_key(self, keys: Sequence[builtins.str]) -> builtins.str | None:
        return next((key for key in keys if key.removeprefix("/") in self._holder(key).data), None)

    def _holder(self, key: builtins.str) -> HFConfig:
        """The config that holds the key: the whole file for `/key`."""
        return self.file if key.startswith("/") else self

    def items(
        self, key: builtins.str, *fallbacks: builtins.str, kind: type[V], length: builtins.int | None = None
    ) -> tuple[V, ...]:
        """A list of values of one type; `length` is the expected number, one per layer. One number is that of all."""
        keys = (key, *fallbacks)
        found = self._find(keys)
        if found is None:
            return self._default(keys, REQUIRED, "a list")
        name, values = found
        if length is not None and kind is not builtins.str and isinstance(values, (builtins.int, builtins.float)):
            return (self._item(name, 0, values, kind),) * len(self.layers(length))
        if not isinstance(values, builtins.list):
            raise self._error(name, "a list", values)
        if length is not None and len(values) != length:
            raise ConfigError(f"{self.path}: '{name}': expected {length} items, one per layer, got {len(values)}")
        return tuple(self._item(name, i, value, kind) for i, value in enumerate(values))

    def _item(self, key: builtins.str, index: builtins.int, value: Any, kind: type[V]) -> V:
        if kind is builtins.float and isinstance(value, builtins.int) and not isinstance(value, builtins.bool):
            value = builtins.float(value) if _fits_float(value) else value
        is_bool = isinstance(value, builtins.bool)
        if not isinstance(value, kind) or is_bool != (kind is builtins.bool):
            raise self._error(f"{key}[{index}]", _EXPECTED[kind], value)
        return value

    def layers(self, count: builtins.int) -> range:
        """The layer numbers; ConfigError for more than MAX_LAYERS, which no model has."""
        if count > MAX_LAYERS:
            raise ConfigError(f"{self.path}: expected at most {MAX_LAYERS} layers, got {count}")
        return range(count)

    def per_layer(
        self, name: builtins.str, text: builtins.str, count: builtins.int, formula: Callable[[builtins.int], V]
    ) -> tuple[V, ...]:
        """One value per layer, computed from the layer number; `text` is the formula as the layout writes it."""
        return tuple(self.computed(name, text, functools.partial(formula, i)) for i in self.layers(count))

    def one_per_layer(self, name: builtins.str, values: tuple[V, ...], count: builtins.int) -> tuple[V, ...]:
        """The layout's default list, checked to have a value per layer."""
        if len(values) != count:
            raise ConfigError(
                f"{self.path}: the default of '{name}': expected {count} items, one per layer, got {len(values)}"
            )
        return values

    def computed(self, name: builtins.str, text: builtins.str, formula: Callable[[], V]) -> V:
        """A value computed from config values; ConfigError naming it and its formula if the arithmetic fails."""
        try:
            return computed(f"'{name}' = {text}", formula)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def sized(self, name: builtins.str, value: builtins.int) -> builtins.int:
        """A computed size: at least 1."""
        if not 1 <= value <= MAX_SIZE:
            raise ConfigError(f"{self.path}: '{name}': expected a size of 1 to {MAX_SIZE}, got {shown(value)}")
        return value

    def require(self, holds: builtins.bool, rule: builtins.str, *values: tuple[builtins.str, object]) -> None:
        """Raises ConfigError unless `holds`; `rule` and `values` (key and value) use the names of the config file."""
        if not holds:
            for name, _ in values:
                instead = self.read_keys.get(name, name)
                rule = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", instead, rule)
            got = ", ".join(f"{self.read_keys.get(name, name)} is {shown(value)}" for name, value in values)
            raise ConfigError(f"{self.path}: requires {rule}, but {got}")

    def _find(self, keys: Sequence[builtins.str]) -> tuple[builtins.str, Any] | None:
        """The first of the keys that is present and not null, with its value."""
        for key in keys:
            name = self._replaced_by(key) or key
            value = self._value(name)
            if value is not None:
                if name != keys[0]:
                    self.read_keys[keys[0]] = name
                return name, value
        return None

    def _value(self, key: builtins.str) -> Any:
        value: Any = self._holder(key).data
        for step in key.removeprefix("/").split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        return value

    def _replaced_by(self, key: builtins.str) -> builtins.str | None:
        """The key in `rope_scaling` that is read instead of one in `rope_parameters`, as in transformers."""
        section, _, name = key.rpartition(".")
        replacing = f"{_OLD_ROPE}.{name}"
        return replacing if section == _NEW_ROPE and self._value(replacing) is not None else None

    def _require_equal(
        self, key: builtins.str, value: builtins.float, others: Sequence[builtins.str], default: object
    ) -> None:
        """Refuses a value in `rope_parameters` that transformers drops because the config has `rope_scaling` too."""
        scaling = self.data.get(_OLD_ROPE)
        if key.rpartition(".")[0] != _NEW_ROPE or not isinstance(scaling, Mapping) or not scaling:
            return
        found = self._find(others)
        instead = found[1] if found is not None else default
        if value != instead:
            name = key.rpartition(".")[2]
            raise ConfigError(
                f"{self.path}: '{key}' is {shown(value)}, but '{_OLD_ROPE}' replaces '{_NEW_ROPE}' and lacks "
                f"'{name}'; add it there, or merge the two into '{_NEW_ROPE}'"
            )

    def _read(self, keys: Sequence[builtins.str], default: V | _Required, kind: type[V], expected: builtins.str) -> V:
        found = self._find(keys)
        if found is None:
            return self._default(keys, default, expected)
        name, value = found
        if not isinstance(value, kind) or (isinstance(value, builtins.bool) and kind is not builtins.bool):
            raise self._error(name, expected, value)
        return value

    def _default(self, keys: Sequence[builtins.str], default: V | _Required, expected: builtins.str) -> V:
        null = self._null_key(keys)
        if null is not None:
            raise self._error(null, expected, None)
        if isinstance(default, _Required):
            also = f" (also looked for {', '.join(keys[1:])})" if len(keys) > 1 else ""
            raise ConfigError(f"{self.path}: the key '{keys[0]}' is missing, expected {expected}{also}")
        return default

    def _key_read(self, key: builtins.str, fallbacks: Sequence[builtins.str]) -> builtins.str:
        found = self._find((key, *fallbacks))
        return found[0] if found else key

    def _error(self, key: builtins.str, expected: builtins.str, got: object) -> ConfigError:
        return ConfigError(
            f"{self._holder(key).path}: '{key.removeprefix('/')}': expected {expected}, got {shown(got)}"
        )


def computed(label: str, formula: Callable[[], V]) -> V:
    """The value of a layout's formula; ConfigError if the arithmetic fails or the result is not finite."""
    try:
        value = formula()
    except (ArithmeticError, ValueError, IndexError) as error:
        raise ConfigError(f"{label} cannot be computed: {error}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{label} must be finite, got {value}")
    return value


def computed_in_layer(layer: int, label: str, formula: Callable[[int], V]) -> V:
    """As `computed`, for a formula of the layer number."""
    return computed(f"{label} in layer {layer}", functools.partial(formula, layer))


def _fits_float(value: builtins.int | builtins.float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer larger than the largest float
        return False


def shown(value: object) -> str:
    """A value in JSON notation, shortened to one line."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return quoted(value, 40)
        case Mapping():
            return "an object"
        case list():
            return "a list"
        case tuple():
            items = ", ".join(shown(item) for item in value[:8])
            return f"[{items}{', ...' if len(value) > 8 else ''}]"
    return str(value)[:40]
