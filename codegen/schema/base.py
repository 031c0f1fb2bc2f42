"""The strict base class of all spec schemas, and the diagnostics for schema violations."""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.source import Document, YamlPath

S = TypeVar("S", bound="Strict")


class BrokenRule(ValueError):
    """A rule of a schema that a value breaks, with the remedy."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.help = help


class Strict(BaseModel):
    """A mapping with known fields only. Values are never converted."""

    # A run validates few kinds of file, so each schema is built when it is first used.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, defer_build=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if sys.flags.optimize > 1:  # schemas and docs are generated from docstrings, which -OO strips
            cls.__doc__ = _docstrings(cls.__module__).get(cls.__qualname__)


@cache
def _docstrings(module: str) -> dict[str, str | None]:
    """The docstrings of the classes of a module, from its source."""
    source = Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {node.name: ast.get_docstring(node, clean=False) for node in classes}


def validate(schema: type[S], doc: Document, sink: Sink) -> S | None:
    """The document's data as `schema`, or None after reporting every violation with its location."""
    try:
        return schema.model_validate(doc.data)
    except ValidationError as error:
        for detail in error.errors():
            _report(detail, schema, doc, sink)
        return None


def _report(detail: ErrorDetails, schema: type[Strict], doc: Document, sink: Sink) -> None:
    path = _data_path(detail["loc"], doc)
    name = str(detail["loc"][-1]) if detail["loc"] else ""
    match detail["type"]:
        case "extra_forbidden":
            known = _fields_at(schema, path[:-1])
            help = _unquoted(path, doc) or did_you_mean(name, known)
            sink.error("SAGE010", f"unknown field '{name}'", doc.key_span(*path), help)
        case "missing":
            parent = path[:-1] if path and path[-1] == name else path
            sink.error("SAGE011", f"the field '{name}' is missing", doc.key_span(*parent), f"add `{name}: ...`")
        case "value_error":
            broken = detail["ctx"]["error"]
            assert isinstance(broken, BrokenRule), f"the schema raises {type(broken).__name__} without a remedy"
            sink.error("SAGE013", str(broken), doc.span(*path), broken.help)
        case _:
            help = _unquoted(path, doc) or _type_help(detail)
            sink.error("SAGE012", _wrong_type(detail, ".".join(map(str, path))), doc.span(*path), help)


def _unquoted(path: YamlPath, doc: Document) -> str | None:
    """The remedy if a key is the rest of a text with a comma: `{doc: eps, added to x}` is read as two keys.

    Both are on one line; a key without a value on a line of its own is no such rest.
    """
    parent: Any = doc.data
    for step in path[:-1]:
        parent = parent[step]
    if not isinstance(parent, dict) or not path or parent.get(path[-1], "") is not None:
        return None
    keys = list(parent)
    at = keys.index(path[-1])
    line = doc.key_span(*path).line
    before = [key for key in keys[:at] if parent[key] is not None and doc.key_span(*path[:-1], key).line == line]
    if not before or not isinstance(text := parent[before[-1]], str):
        return None
    rest = [str(key) for key in keys[keys.index(before[-1]) + 1 : at + 1]]
    return f'quote the text with a comma: `{before[-1]}: "{", ".join([text, *rest])}"`'


_HELP = {
    "string_type": "write a text; quote it if it looks like a number, true, false or null",
    "int_type": "write an integer without quotes",
    "float_type": "write a number without quotes",
    "bool_type": "write true or false without quotes",
    "dict_type": "write `{key: value}`, or one key per line",
    "model_type": "write `{key: value}`, or one key per line",
    "list_type": "write `[a, b]`, or one `- item` per line",
    "tuple_type": "write `[a, b]`, or one `- item` per line",
    "none_required": "write null, or remove it",
    "string_pattern_mismatch": "write a text of this pattern, such as a lower-case name",
    "too_short": "add an item, or remove the field or the file",
    "too_long": "remove items",
    "string_too_short": "write a text",
}


def _type_help(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return did_you_mean(str(detail["input"]), choices) if choices else f"write {detail['ctx']['expected']}"
    return _HELP.get(detail["type"], "change the value; the reference of the spec language describes the field")


_EXPECTED = {
    "string_type": "text",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "none_required": "null",
}


def _wrong_type(detail: ErrorDetails, where: str) -> str:
    place = f"'{where}'" if where else "the file"
    if detail["type"] == "literal_error":
        return f"{place}: expected {detail['ctx']['expected']}, got {_shown(detail['input'])}"
    if detail["type"] == "too_short":
        return f"{place}: expected {detail['ctx']['min_length']} or more items, got {detail['ctx']['actual_length']}"
    if expected := _EXPECTED.get(detail["type"]):
        return f"{place}: expected {expected}, got {_shown(detail['input'])}"
    return f"{place}: {detail['msg'][:1].lower()}{detail['msg'][1:]}, got {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return f"the text '{value[:40]}'"
        case _:
            return f"the number {value}"


def _data_path(loc: tuple[int | str, ...], doc: Document) -> YamlPath:
    """The part of pydantic's location that exists in the data, without the names of union members."""
    value: Any = doc.data
    path: list[str | int] = []
    for i, step in enumerate(loc):
        if _has(value, step):
            path.append(step)
            value = value[step]
        elif i == len(loc) - 1 and isinstance(step, str) and isinstance(value, dict):
            path.append(step)
    return tuple(path)


def _has(value: Any, step: int | str) -> bool:
    return (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int))


def _fields_at(schema: type[Strict], path: YamlPath) -> list[str]:
    """The fields of `schema` at `path`, for the did-you-mean line."""
    found: list[Any] = [schema]
    for step in path:
        found = [inner for kind in found for inner in _step_into(kind, step)]
    models = [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return sorted({field.alias or name for kind in models for name, field in kind.model_fields.items()})


def _step_into(kind: Any, step: str | int) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {field.alias or name: field for name, field in kind.model_fields.items()}
        return _members(fields[step].annotation) if step in fields else []
    return [inner for argument in get_args(kind) for inner in _members(argument)]


def _members(annotation: Any) -> list[Any]:
    """The models and containers inside an annotation such as `dict[str, A | B] | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    origin_args = get_args(annotation)
    if not origin_args:
        return []
    if getattr(annotation, "__origin__", None) in (dict, list, tuple):
        return [annotation]
    return [inner for argument in origin_args for inner in _members(argument)]
