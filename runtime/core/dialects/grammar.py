"""Grammars of forced tool calls, in the Lark dialect of llguidance: what they admit, the parser reads back.

start: call_0 ("\\n" call_0)*
call_0: "<tool_call>\\n" object_0 "\\n</tool_call>"
object_0: %json {"type": "object", "properties": {"name": {"const": "f"}, "arguments": {...}}, ...}
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sageLLM.runtime.core.dialects.call_reader import divided
from sageLLM.runtime.core.dialects.literals import is_text
from sageLLM.runtime.core.dialects.model import Arguments, Calls, Form, Hole, Maybe, Reasoning
from sageLLM.runtime.core.dialects.source import SPACE
from sageLLM.runtime.core.dialects.writer import python_text

SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The whitespace of JSON as chat templates write it, so that a call cannot be drawn out."""
ANYTHING = "/(?s:.*)/"
MAX_SKIPPED = 3
ANNOTATIONS = frozenset({"$schema", "$comment", "title", "description", "default", "examples", "deprecated"})
_OBJECT_KEYS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_TEXT_KEYS = ANNOTATIONS | {"type", "enum", "const"}
_PYTHON_KEYS = _TEXT_KEYS | {"items", "properties", "required", "additionalProperties", "anyOf", "oneOf"}
PYTHON_RULES = """\
python: python_text | PYTHON_NUMBER | "True" | "False" | "None" | python_list | python_dict
python_list: "[" (python (", " python)*)? "]"
python_dict: "{" (python_text ": " python (", " python_text ": " python)*)? "}"
python_text: /"([^"\\\\\\x00-\\x1f]|\\\\["\\\\nt])*"/
PYTHON_INTEGER: /-?(0|[1-9][0-9]{0,15})/
PYTHON_NUMBER: /-?(0|[1-9][0-9]{0,15})(\\.[0-9]{1,15})?/
"""


class CannotConstrain(ValueError):
    """A schema that the dialect cannot enforce; the message names the keyword."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """Facts for a grammar besides the dialect: the schemas of the functions that may be called, whether several calls
    may follow one another, and special tokens by text. Ones of `end_ids` end the answer, so they are not in it.

    `reasoning` may come first; it must if the prompt has opened it.
    """

    tools: Mapping[str, Mapping[str, Any]]
    is_parallel: bool = True
    special_ids: Mapping[str, int] = field(default_factory=dict)
    end_ids: Collection[int] = frozenset()
    reasoning: Reasoning | None = None
    in_reasoning: bool = False


def call_grammar(calls: Calls, constraint: Constraint) -> str:
    """The grammar of one or more calls. Raises CannotConstrain."""
    return _Grammar(calls, constraint).text()


def reasoning_grammar(constraint: Constraint, skip: Sequence[str], following: str) -> str:
    """The dialect's reasoning, up to MAX_SKIPPED of its marks to skip, and then the grammar of the name `following`."""
    return _Grammar(None, constraint).before(skip, following)


class _Grammar:
    """The rules of one grammar."""

    def __init__(self, calls: Calls | None, constraint: Constraint) -> None:
        self._given, self._constraint = calls, constraint
        self._rules: list[str] = []
        self._uses_python = False
        marks = sorted(constraint.special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    @property
    def _calls(self) -> Calls:
        assert self._given is not None, "a grammar of calls has a dialect of calls"
        return self._given

    def before(self, skip: Sequence[str], following: str) -> str:
        ends = {text for text, one in self._constraint.special_ids.items() if one in self._constraint.end_ids}
        marks = [self._terms(mark) for mark in skip if not any(end in mark for end in ends)]
        skipped = f"({' | '.join(f'({mark})' for mark in marks)}){{0,{MAX_SKIPPED}}}" if marks else ""
        start = " ".join(part for part in (self._thoughts(), skipped, following) if part)
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def text(self) -> str:
        form = self._calls.forms[0]
        names = [self._call(number, name, form) for number, name in enumerate(self._constraint.tools)]
        one = f"({' | '.join(names)})"
        more = f" ({self._terms(form.separator)} {one})*" if self._constraint.is_parallel else ""
        closing = self._terms(form.close)
        start = " ".join(part for part in (self._thoughts(), self._terms(form.open), one + more, closing) if part)
        rules = [f"start: {start}", *self._rules]
        return "\n".join(rules) + "\n" + (PYTHON_RULES if self._uses_python else "")

    # --- parts ---

    def _terms(self, text: str, *, is_end: bool = False) -> str:
        """A literal; special tokens in it by id. At the end of an answer, those that end it are left out."""
        terms, start = [], 0
        for match in self._special.finditer(text):
            terms += [_quoted(text[start : match.start()])]
            token_id = self._constraint.special_ids[match[0]]
            terms += [] if is_end and token_id in self._constraint.end_ids else [f"<[{token_id}]>"]
            start = match.end()
        return " ".join(term for term in [*terms, _quoted(text[start:])] if term)

    def _until(self, name: str, mark: str) -> str:
        """A rule for any text up to a mark, which is a special token or text."""
        if self._special.match(mark):
            self._rules.append(f"{name}: {ANYTHING} {self._terms(mark)}")
        else:
            self._rules.append(f"{name}[suffix={_quoted(mark)}]: {ANYTHING}")
        return name

    def _thoughts(self) -> str:
        reasoning = self._constraint.reasoning
        if reasoning is None:
            return ""
        mark = reasoning.close.strip()
        after = self._terms(reasoning.close.lstrip()[len(mark) :] + reasoning.then)
        block = f"{self._until('thoughts', mark)} {after}"
        return block if self._constraint.in_reasoning else f"({self._terms(reasoning.open)} {block})?"

    def _call(self, number: int, name: str, form: Form) -> str:
        """The rule of the calls of one function."""
        is_last = not form.close
        terms = []
        for position, part in enumerate(form.call):
            is_end = is_last and position == len(form.call) - 1
            match part:
                case str():
                    terms.append(self._terms(part, is_end=is_end))
                case Maybe(text):
                    terms.append(self._terms(text))
                case Hole.NAME:
                    terms.append(_quoted(name))
                case Hole.ID:
                    terms.append("/[A-Za-z0-9]{9}/")
                case Hole.INDEX:
                    terms.append("/0|[1-9][0-9]{0,2}/")
                case Hole.OBJECT:
                    terms.append(self._json(f"object_{number}", self._object_schema(name)))
                case Hole.ARGUMENTS:
                    terms.append(self._arguments(number, name))
        self._rules.append(f"call_{number}: {' '.join(term for term in terms if term)}")
        return f"call_{number}"

    def _json(self, rule: str, schema: Mapping[str, Any]) -> str:
        # `::=` is a sign of another notation of grammars
        text = json.dumps({**schema, "x-guidance": SEPARATORS}).replace("::=", "\\u003a:=")
        self._rules.append(f"{rule}: %json {text}")
        return rule

    def _object_schema(self, name: str) -> dict[str, Any]:
        keys, schema = self._calls.keys, dict(_object(self._constraint.tools[name]))
        assert keys is not None, "a form with an object has its keys, which the generator checks"
        shared = {key: schema.pop(key) for key in ("$defs", "definitions") if key in schema}
        properties = {keys.name: {"const": name}, keys.arguments: schema}
        required = [keys.name, keys.arguments]
        closed = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        return closed | shared

    # --- arguments ---

    def _arguments(self, number: int, name: str) -> str:
        schema = _object(self._constraint.tools[name])
        if self._calls.arguments is None:
            return self._json(f"arguments_{number}", schema)
        _refuse_others(schema, _OBJECT_KEYS, f"the parameters of '{name}'")
        properties = schema.get("properties", {})
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        rules = []
        for position, (key, one) in enumerate(properties.items()):
            inner = one if isinstance(one, Mapping) else {}
            rule = f"argument_{number}_{position}"
            self._rules.append(f"{rule}: {self._argument(rule, key, inner, shared, self._calls.arguments)}")
            rules.append((rule, key in schema.get("required", ())))
        return self._series(f"arguments_{number}", rules, self._terms(self._calls.arguments.separator))

    def _argument(
        self, rule: str, key: str, schema: Mapping[str, Any], shared: Mapping[str, Any], arguments: Arguments
    ) -> str:
        head, hole, tail = divided(arguments.each)
        before = self._terms("".join(key if part is Hole.KEY else _literal(part) for part in head))
        if hole is Hole.PYTHON:
            self._uses_python = True
            return f"{before} {self._python(rule, schema)} {self._terms(tail)}"
        if is_text(schema):
            return f"{before} {self._text(rule, schema, tail)}"
        value = self._json(f"{rule}_value", {**schema, **shared})
        return f"{before} {value} {self._terms(tail)}"

    def _text(self, rule: str, schema: Mapping[str, Any], tail: str) -> str:
        """A text as it is, up to the mark."""
        _refuse_others(schema, _TEXT_KEYS, "a text that is written as it is")
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if choices is not None:
            return f"({' | '.join(map(_quoted, choices))}) {self._terms(tail)}"
        mark = tail.strip(SPACE)
        after = tail[tail.index(mark) + len(mark) :]
        return f"{self._until(f'{rule}_text', mark)} {self._terms(after)}"

    def _series(self, name: str, rules: Sequence[tuple[str, bool]], separator: str) -> str:
        """Arguments in the order of the schema, of which only required ones must be there."""
        for position in reversed(range(len(rules) + 1)):
            first, following = [], []
            if position < len(rules):
                rule, is_required = rules[position]
                first = [f"{rule} {name}_{position + 1}_more"]
                following = [f"{separator} {rule} {name}_{position + 1}_more"]
                if not is_required:
                    first.append(f"{name}_{position + 1}")
                    following.append(f"{name}_{position + 1}_more")
            self._rules.append(f"{name}_{position}: {' | '.join(first) or EMPTY}")
            self._rules.append(f"{name}_{position}_more: {' | '.join(following) or EMPTY}")
        return f"{name}_0"

    # --- Python ---

    def _python(self, rule: str, schema: Mapping[str, Any]) -> str:
        """The Python literals of the values of a schema."""
        _refuse_others(schema, _PYTHON_KEYS, "a Python literal")
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if choices is not None:
            return f"({' | '.join(_quoted(python_text(choice)) for choice in choices)})"
        for word in ("anyOf", "oneOf"):
            if word in schema:
                branches = [self._python(f"{rule}_{number}", one) for number, one in enumerate(schema[word])]
                return f"({' | '.join(branches)})"
        kinds = schema.get("type", "any")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return f"({' | '.join(self._python_type(rule, str(kind), schema) for kind in kinds)})"

    def _python_type(self, rule: str, kind: str, schema: Mapping[str, Any]) -> str:
        words = {"string": "python_text", "integer": "PYTHON_INTEGER", "number": "PYTHON_NUMBER", "any": "python"}
        words |= {"boolean": '("True" | "False")', "null": '"None"'}
        if kind in words:
            return words[kind]
        if kind == "array":
            item = self._python(f"{rule}_item", schema.get("items") or {})
            return f'"[" ({item} (", " {item})*)? "]"'
        if kind == "object" and "properties" in schema:
            required = schema.get("required", ())
            rules = []
            for position, (key, one) in enumerate(schema["properties"].items()):
                inner = f"{rule}_{position}"
                self._rules.append(f"{inner}: {_quoted(python_text(key) + ': ')} {self._python(inner + '_value', one)}")
                rules.append((inner, key in required))
            return f'"{{" {self._series(f"{rule}_pairs", rules, _quoted(", "))} "}}"'
        return "python_dict"


EMPTY = '""'


def _literal(part: str | Maybe | Hole) -> str:
    assert not isinstance(part, Hole), "the head of an argument has one hole"
    return part.text if isinstance(part, Maybe) else part


def _quoted(text: str) -> str:
    """A literal of the grammar; nothing for the empty text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of parameters, which are an object also if it does not say so."""
    return {"type": "object", **schema}


def _refuse_others(schema: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    for name in schema:
        if name not in known:
            raise CannotConstrain(f"the keyword '{name}' cannot be enforced in {what}; remove it")
