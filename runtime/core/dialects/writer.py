"""Writes tool calls in the first form of a dialect, as a model of the family does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sageLLM.runtime.core.dialects.literals import dump
from sageLLM.runtime.core.dialects.model import Arguments, Calls, Hole, Maybe, ObjectKeys, Pattern


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call to write."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


def write_calls(calls: Calls, items: Sequence[WrittenCall]) -> str:
    form = calls.forms[0]
    texts = [_call(calls, form.call, item, index) for index, item in enumerate(items)]
    return form.open + form.separator.join(texts) + form.close


def _call(calls: Calls, pattern: Pattern, item: WrittenCall, index: int) -> str:
    parts = {
        Hole.NAME: lambda: item.name,
        Hole.ID: lambda: item.id,
        Hole.INDEX: lambda: str(index),
        Hole.OBJECT: lambda: _object(calls.keys, item),
        Hole.ARGUMENTS: lambda: _arguments(calls.arguments, item.arguments),
    }
    return "".join(parts[part]() if isinstance(part, Hole) else _literal(part) for part in pattern)


def _literal(part: str | Maybe) -> str:
    return part.text if isinstance(part, Maybe) else part


def _object(keys: ObjectKeys | None, item: WrittenCall) -> str:
    assert keys is not None, "a form with an object has its keys, which the generator checks"
    values: dict[str, Any] = {keys.name: item.name, keys.arguments: dict(item.arguments)}
    return dump(values | ({keys.id: item.id} if keys.id and item.id else {}))


def _arguments(arguments: Arguments | None, values: Mapping[str, Any]) -> str:
    if arguments is None:
        return dump(dict(values))
    return arguments.separator.join(_argument(arguments.each, key, value) for key, value in values.items())


def _argument(each: Pattern, key: str, value: object) -> str:
    parts = {
        Hole.KEY: lambda: key,
        Hole.VALUE: lambda: value if isinstance(value, str) else dump(value),
        Hole.PYTHON: lambda: python_text(value),
    }
    return "".join(parts[part]() if isinstance(part, Hole) else _literal(part) for part in each)


def python_text(value: object) -> str:
    """A JSON value as a Python literal, with texts in double quotes."""
    match value:
        case str():
            return dump(value)
        case list():
            return f"[{', '.join(map(python_text, value))}]"
        case dict():
            return f"{{{', '.join(f'{dump(key)}: {python_text(item)}' for key, item in value.items())}}}"
    return repr(value)
