"""Values of arguments that are not written as JSON: texts as they are, and Python literals."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from typing import Any

_NAMES = {"true": True, "false": False, "null": None}
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


def types_of(schema: object) -> frozenset[str]:
    """The JSON types that a schema allows; none if it does not tell."""
    if not isinstance(schema, Mapping):
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(one for one in kind if isinstance(one, str))
    for word in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(word), list):
            found = [types_of(branch) for branch in branches]
            return frozenset().union(*found) if all(found) else frozenset()
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if isinstance(values, list):
        return frozenset(_type_of(value) for value in values)
    return frozenset()


def _type_of(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    return next(name for name, kind in _TYPES.items() if isinstance(value, kind))


def is_text(schema: object) -> bool:
    """Whether the values of a schema are texts only, which can be streamed."""
    return types_of(schema) == {"string"}


def json_of_text(text: str, schema: object) -> str:
    """The JSON of a value that is written as it is: a text if the schema allows texts and the value is nothing else."""
    types = types_of(schema)
    if types == {"string"}:
        return dump(text)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = _python_or_text(text)
    if types and not _fits(value, types) and "string" in types:
        value = text
    return dump(value)


def dump(value: object) -> str:
    """The JSON of a value; with escapes if it contains half of a surrogate pair, which UTF-8 has no bytes for."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _python_or_text(text: str) -> Any:
    """Models write True, None and lists of Python where JSON is expected."""
    try:
        return python_value(text)
    except ValueError:
        return text


def _fits(value: object, types: frozenset[str]) -> bool:
    name = _type_of(value)
    return name in types or (name == "integer" and "number" in types)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def python_value(text: str) -> Any:
    """The value of a Python literal with JSON types. Raises ValueError."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError, ValueError) as error:
        raise ValueError(f"expected a Python literal: {error}") from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | str() | int() | None as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if not isinstance(
            value, bool
        ):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
    raise ValueError(f"{type(node).__name__} is not a literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("the keys of a mapping must be texts")
