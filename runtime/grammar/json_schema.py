"""Check of JSON schemas: every keyword is one that the grammar enforces, or an annotation.

llguidance refuses the keywords of the standard that it does not implement, and ignores all others, such as misspelled
ones. Here both are refused, with their name and place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

SCHEMA_KEYWORDS = frozenset({"additionalItems", "additionalProperties", "items"})
"""Keywords with a schema."""
LIST_KEYWORDS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
"""Keywords with a list of schemas."""
MAP_KEYWORDS = frozenset({"$defs", "definitions", "patternProperties", "properties"})
"""Keywords with an object of schemas."""
VALUE_KEYWORDS = frozenset(
    {
        *("$ref", "const", "enum", "type"),
        *("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"),
        *("format", "maxLength", "minLength", "pattern"),
        *("maxItems", "minItems"),
        *("maxProperties", "minProperties", "required"),
    }
)
ANNOTATIONS = frozenset(
    {
        *("$anchor", "$comment", "$id", "$schema", "id"),
        *("default", "deprecated", "description", "discriminator", "example", "examples", "title"),
        *("contentEncoding", "contentMediaType", "readOnly", "writeOnly"),
    }
)
"""Keywords that restrict nothing."""
ENFORCED = SCHEMA_KEYWORDS | LIST_KEYWORDS | MAP_KEYWORDS | VALUE_KEYWORDS
BOOLEAN_BOUNDS = frozenset({"exclusiveMaximum", "exclusiveMinimum"})


def why_not_enforced(schema: object) -> str | None:
    """The first keyword that cannot be enforced, with its place; None if all can."""
    for place, one in subschemas(schema, "$"):
        if isinstance(one, bool):
            continue
        if not isinstance(one, Mapping):
            return f"{place} must be an object or a boolean, got a {type(one).__name__}"
        for name, value in one.items():
            if reason := _why_not(name, value):
                return f"the keyword {name!r} at {place} {reason}"
    return None


def _why_not(name: str, value: object) -> str | None:
    if name in BOOLEAN_BOUNDS and isinstance(value, bool):
        return "must be a number; booleans are of draft 4"
    if name == "$ref" and not (isinstance(value, str) and value.startswith("#")):
        return "must refer to a place in the schema, beginning with '#'"
    if name in ENFORCED or name in ANNOTATIONS or (name.startswith("x-") and name != "x-guidance"):
        return None
    near = difflib.get_close_matches(name, ENFORCED, n=1, cutoff=0.8)
    return f"is unknown; did you mean {near[0]!r}?" if near else "is not enforced; remove it"


def subschemas(schema: object, place: str) -> Iterator[tuple[str, Any]]:
    """The schema and all schemas in it, with their places."""
    yield place, schema
    if not isinstance(schema, Mapping):
        return
    for name, value in schema.items():
        inner = f"{place}.{name}"
        if name in MAP_KEYWORDS and isinstance(value, Mapping):
            for key, one in value.items():
                yield from subschemas(one, f"{inner}.{key}")
        elif (name in LIST_KEYWORDS or name in SCHEMA_KEYWORDS) and isinstance(value, list):
            for number, one in enumerate(value):
                yield from subschemas(one, f"{inner}[{number}]")
        elif name in SCHEMA_KEYWORDS or name in LIST_KEYWORDS or name in MAP_KEYWORDS:
            yield from subschemas(value, inner)


def close_objects(schema: Any) -> None:
    """Forbids further properties, in place, for every object schema that declares its properties."""
    for _, one in subschemas(schema, "$"):
        if isinstance(one, dict) and "properties" in one:
            one.setdefault("additionalProperties", False)
