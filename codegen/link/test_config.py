"""Checks `tests.tiny`, the config.json of tests, against the config names that read it."""

import difflib
from collections.abc import Mapping

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.link.flat_layout import FlatModel
from sageLLM.codegen.model.layout import ConfigName

_EXPECTED: Mapping[str, tuple[type, ...]] = {
    "size": (int,), "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,),
}  # fmt: skip
_WORDS = {"size": "an integer of at least 1", "int": "an integer", "float": "a number", "bool": "true or false"}


def check_test_config(flat: FlatModel, config: Mapping[str, ConfigName], sink: Sink) -> None:
    """Reports values of another type than their key's, and keys that are nearly those of the layout."""
    keys = [key for found in config.values() for key in found.keys]
    for key, value in flat.entry.spec.tests.tiny.items():
        path = ("tests", "tiny", key)
        names = [found for found in config.values() if key in found.keys]
        for found in names:
            if (expected := _why_wrong(value, found)) is not None:
                message = f"'{key}': expected {expected}, got {_shown(value)}"
                help = f"config name '{found.name}' reads it"
                sink.error("SAGE234", message, flat.entry.span(*path), help)
        top = {one.partition(".")[0] for one in keys}
        near = [] if key in top else difflib.get_close_matches(key, top, n=1, cutoff=0.9)
        if near:
            message = f"the layout does not read '{key}'"
            sink.error("SAGE234", message, flat.entry.key_span(*path), f"did you mean '{near[0]}'?")


def _why_wrong(value: object, found: ConfigName) -> str | None:
    """The expected value in words, or None if the value fits."""
    if value is None:
        is_null = found.is_optional or found.if_null is not None or found.default is not None
        return None if is_null else _words(found)
    if isinstance(value, str) and value in dict(found.texts):
        return None
    if found.items == "layers" and found.type != "str" and _fits(value, found):
        return None  # a number is that of every layer
    if found.items is not None:
        fits = isinstance(value, list) and all(_fits(item, found) for item in value)
        return None if fits else f"a list of {found.type}"
    return None if _fits(value, found) else _words(found)


def _fits(value: object, found: ConfigName) -> bool:
    is_type = isinstance(value, _EXPECTED[found.type]) and isinstance(value, bool) == (found.type == "bool")
    return is_type and not (found.type == "size" and isinstance(value, int) and value < 1)


def _words(found: ConfigName) -> str:
    return _WORDS.get(found.type, "text")


def _shown(value: object) -> str:
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return f"the text '{value[:40]}'"
        case list():
            return "a list"
        case dict():
            return "a mapping"
    return str(value)
