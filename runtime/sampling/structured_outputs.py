"""Parameters of structured output: vLLM's `StructuredOutputsParams`, with every field checked on creation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sageLLM.runtime.errors import SamplingParamsError

FIELD = "structured_outputs"
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
MAX_GRAMMAR_LEN = 512 * 1024
MAX_CHOICES = 4096
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form of an answer; exactly one of the first six fields is set. Names and meanings are vLLM's.

    `json` is a JSON schema and `structural_tag` an object with `structures` and `triggers`, each as an object or as
    text; both are stored as text. `grammar` is in the Lark dialect of llguidance, or in GBNF. The JSON of `json` and
    `json_object` contains no whitespace with `disable_any_whitespace`, or that of the regex `whitespace_pattern`.
    `disable_additional_properties` closes every object of the schema that declares properties. `before` is set by the
    server: a grammar in the Lark dialect of what precedes the form, with the form as `@form`. Raises
    SamplingParamsError.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    disable_additional_properties: bool = False
    before: str | None = None

    def __post_init__(self) -> None:
        kinds = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(kinds) != 1:
            raise _error(f"must have exactly one of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
        for name in ("json", "structural_tag"):
            object.__setattr__(self, name, _json_text(name, getattr(self, name)))
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool | None):
                raise _error(f"must have a {name} of True or False, got {_kind(getattr(self, name))}")

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @classmethod
    def from_mapping(cls, values: object) -> StructuredOutputsParams:
        """The parameters in a request's body. Raises SamplingParamsError, also for an unknown name."""
        if not isinstance(values, Mapping):
            raise _error(f"must be an object, got {_kind(values)}")
        known = [f.name for f in fields(cls) if f.name != "before"]
        for name in values:
            if name not in known:
                raise _error(f"must have only the fields {', '.join(known)}, got {str(name)[:60]!r}")
        return cls(**{name: value for name, value in values.items() if value is not None})


def parse(name: str, text: str) -> Any:
    """The JSON value of the field `name`. Raises SamplingParamsError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(f"must have a {name} in JSON: {error}") from None
    return value


def _json_text(name: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        _check_text(name, value)
        value = parse(name, value)
    elif not isinstance(value, Mapping):
        raise _error(f"must have a {name} that is an object or a text, got {_kind(value)}")
    _check_depth(name, value)
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise _error(f"must have a {name} of JSON values: {error}") from None
    _check_text(name, text)
    return text


def _check_depth(name: str, value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for one in level
            if isinstance(one, Mapping | list)
            for child in (one.values() if isinstance(one, Mapping) else one)
        ]
        if not level:
            return
    raise _error(f"must have a {name} that is nested at most {MAX_DEPTH} levels deep")


def _check_text(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise _error(f"must have a {name} that is a text of at least one character, got {_kind(value)}")
    if len(value) > MAX_GRAMMAR_LEN:
        raise _error(f"must have a {name} of at most {MAX_GRAMMAR_LEN} characters, got {len(value)}")


def _choices(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise _error(f"must have a choice that is a list of texts, got {_kind(value)}")
    if not 1 <= len(value) <= MAX_CHOICES:
        raise _error(f"must have a choice of 1 to {MAX_CHOICES} texts, got {len(value)}")
    if sum(map(len, value)) > MAX_GRAMMAR_LEN:
        raise _error(f"must have a choice of at most {MAX_GRAMMAR_LEN} characters")
    if not all(value):
        raise _error("must have a choice of texts with at least one character each")
    return tuple(value)


def _kind(value: object) -> str:
    return "an empty text" if value == "" else f"a {type(value).__name__}"


def _error(rule: str) -> SamplingParamsError:
    return SamplingParamsError(f"{FIELD} {rule}", FIELD)
